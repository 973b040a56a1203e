"""What the work of models takes: measured by rehearsals on this machine, from FLOPs on a named one."""

import dataclasses
import functools
import math
from typing import Any

from hfkit.planning import memory, process
from hfkit.planning.estimate import A_LAUNCH, FRAGMENTS, Costs, Estimate, Speeds
from hfkit.planning.machines import Machine, Prices, Spread
from hfkit.planning.memory import Memory
from hfkit.planning.schedule import Schedule, compiles, schedule_of
from hfkit.planning.shapes import shape_of
from hfkit.planning.work import Chore, Lengths, Measuring, Model, Part, Reading, Training, Work, Writing
from hfkit.training.decisions import COMPILE_SECONDS

OF_MEASURING = 6e7  # bytes of the metrics, beside the libraries of a training
PASS_SECONDS = 1.0  # a rehearsal's pass may take so long; else it has fewer rows, or there is none
EXPECTED = 0.3  # of the measured peak, where that is to be foreseen
COMPILED = 0.92  # of a pass's time on a CPU, see benchmarks/results/pretrain_speed_cpu_bf16.json
ROOM = 0.6  # of the free memory that a rehearsal may take
SETTING_UP = 0.6  # in the time that the libraries take to load: what a training loads beside them, and its report
WRITTEN_A_SECOND = 200e6  # bytes of a checkpoint, with their digests
A_SAVE = 0.25  # seconds of each
LAYER_SECONDS = 4e-4  # of a GPU for a layer forward, however small: kernels are launched one by one
SPEED_PROMPT, SPEED_TOKENS, SPEED_TIMES, SPEED_BATCH = 32, 64, 4, 8  # see hfkit.evaluation.costs
SAMPLES, SAMPLE_TOKENS = 3, 48  # see hfkit.evaluation.measuring


def of_models(costs: Costs, work: Work) -> Estimate:
    """The estimate of work that models have a part in."""
    values = {each.name: getattr(costs, each.name) for each in dataclasses.fields(costs)}
    return _Pricing(**values, precision=costs.precision).estimate(work)


@dataclasses.dataclass(frozen=True)
class _Pricing:
    """The work of models on a machine."""

    machine: Machine
    spread: Spread
    prices: Prices
    speeds: Speeds
    loaded: float
    precision: str

    def estimate(self, work: Work) -> Estimate:
        found = Estimate(disk=work.disk + work.cache)
        parts = list(_flat(work.parts))
        seconds, peak, base = self._times(parts)
        found.is_measured = peak is not None
        for part, taken in zip(parts, seconds, strict=True):
            found.flops += self._flops(part)
            if isinstance(part, Training):
                self._add_training(found, part, taken, parts, seconds)
            elif not (isinstance(part, Reading | Writing) and part.of == "evaluation"):
                found.add(part.what, taken)
        if any(isinstance(part, Measuring) for part in parts):
            found.add("starting the measurements", self.speeds.imports if self.machine.is_here else A_LAUNCH)
        self._add_memory(found, parts, peak, base, work.left_behind)
        return found

    # ---- time

    def _times(self, parts: list[Part]) -> tuple[list[Any], float | None, float]:
        """Of each part seconds, of a training for a pass and the optimizer; the peak if it was measured; the base."""
        heavy = [part for part in parts if isinstance(part, Training | Reading | Writing)]
        done = self._rehearsed(heavy) if self.machine.is_here and heavy else None
        of_heavy = iter(done.seconds if done is not None else [self._foreseen(part) for part in heavy])
        seconds: list[Any] = []
        for part in parts:
            if isinstance(part, Chore):
                seconds.append(part.seconds)
            elif isinstance(part, Measuring):
                seconds.append(self._measuring(part))
            else:
                seconds.append(next(of_heavy))
        peak = None if done is None else done.peak
        return seconds, peak, self.speeds.libraries if done is None else done.base

    def _measuring(self, part: Measuring) -> float:
        does = [*_of_speeds(part.model), *part.does]
        done = self._rehearsed(does) if self.machine.is_here else None
        load = 0.2 + shape_of(part.model, 8).weight_bytes / 1e9
        return load + sum(done.seconds if done is not None else map(self._foreseen, does))

    def _rehearsed(self, parts: list[Any]) -> Any:
        """What a rehearsal gives, scaled to whole batches; None where one would take too long or too much memory."""
        import psutil

        limits = [self._rows_that_fit(part) for part in parts]
        if not all(limits):
            return None
        needed = max((self._bytes(part) for part in parts), default=0)
        if needed > ROOM * psutil.virtual_memory().available and self.machine.is_cpu:
            return None
        done = _rehearse(_Parts(parts, tuple(limits)), self.precision)
        if done is None:
            return None
        scaled, extra = [], 0.0
        for part, taken, rows in zip(parts, done.seconds, limits, strict=True):
            if isinstance(part, Training):
                schedule = schedule_of(part, self.spread.processes)
                share = schedule.batch / rows * (self.spread.processes if self.machine.is_cpu else 1)
                scaled.append((taken.of_pass * share, taken.of_optimizer, taken.before))
                kept = memory.of_training(part, Spread(), self._is_half(schedule), self.machine.is_cpu)
                extra = max(extra, (kept["activations"] + kept["logits"]) * (1 - rows / schedule.batch))
            else:
                scaled.append(taken)
        if self.machine.is_cpu:
            extra += _left_in_pieces(parts) * (done.peak - done.base)
        return dataclasses.replace(done, seconds=scaled, peak=done.peak + extra)

    def _rows_that_fit(self, part: Training | Reading | Writing) -> int:
        """Rows of a batch that a rehearsal's pass can take; 0 for none."""
        batch = schedule_of(part, 1).batch if isinstance(part, Training) else part.batch
        if isinstance(part, Writing):
            return min(batch, part.prompts) if self._pass_seconds(part, 1) <= PASS_SECONDS else 0
        a_row = self._pass_seconds(part, 1)
        return min(batch, int(PASS_SECONDS / a_row))

    def _pass_seconds(self, part: Training | Reading | Writing, rows: int) -> float:
        return rows * _row_flops(part) / (self.speeds.flops * EXPECTED)

    def _bytes(self, part: Training | Reading | Writing) -> float:
        if not isinstance(part, Training):
            return sum(memory.of_model(part).values())
        is_half = self._is_half(schedule_of(part, 1))
        return sum(memory.of_training(part, Spread(), is_half, self.machine.is_cpu).values())

    def _foreseen(self, part: Training | Reading | Writing) -> Any:
        """From FLOPs, the peak and the assumed utilisation, as `_rehearsed` gives it."""
        speed, layers = self.machine.flops * self.prices.utilisation, shape_of(part.model, 8).layers
        launch = 0 if self.machine.is_cpu else layers * LAYER_SECONDS
        if isinstance(part, Training):
            schedule = schedule_of(part, self.spread.processes)
            rows = schedule.batch * (self.spread.processes if self.machine.is_cpu else 1)
            if part.teacher is not None:
                launch += shape_of(part.teacher, 8).layers * LAYER_SECONDS / 3
            shape = shape_of(part.model, 8)
            optimizer = 12 * shape.trained / self.machine.bandwidth + launch / 2
            return max(rows * _row_flops(part) / speed, 3 * launch), optimizer, 0.0
        if isinstance(part, Reading):
            passes = math.ceil(part.rows / part.batch)
            return max(part.rows * _row_flops(part) / speed, passes * launch)
        steps = math.ceil(part.prompts / part.batch) * part.new_tokens
        weights = shape_of(part.model, 8).weight_bytes / self.machine.bandwidth
        return part.prompts * _row_flops(part) / speed + steps * (weights + launch)

    def _add_training(
        self, found: Estimate, part: Training, taken: tuple[float, float, float], parts: list[Part], seconds: list[Any]
    ) -> None:
        schedule = schedule_of(part, self.spread.processes)
        shape = shape_of(part.model, part.lengths.longest)
        of_pass, of_optimizer, before = taken
        is_compiled = compiles(schedule, of_pass, self.machine.is_cpu)
        if is_compiled and self.machine.is_cpu:
            of_pass *= COMPILED
        found.add(part.what, schedule.steps * (schedule.accumulation * of_pass + of_optimizer))
        if is_compiled:
            found.add("compiling", COMPILE_SECONDS)
        for each, of_each in zip(parts, seconds, strict=True):
            if each in part.at_evaluations:
                found.add(each.what, schedule.evaluations * of_each)
        checkpoint = _checkpoint_bytes(part)
        if schedule.saves:
            found.add("saving", schedule.saves * (A_SAVE + checkpoint / WRITTEN_A_SECOND))
        found.add("setting up", before + SETTING_UP * (self.speeds.imports if self.machine.is_here else A_LAUNCH))
        found.disk += schedule.checkpoints * checkpoint
        if not found.steps:  # of the first: a second one is the same again
            found.steps, found.parameters, found.trained = schedule.steps, shape.parameters, shape.trained
            found.tokens = schedule.steps * schedule.rows_a_step * part.lengths.mean
        found.devices = max(found.devices, 1 if self.machine.is_cpu else self.spread.processes)

    def _flops(self, part: Part) -> float:
        if isinstance(part, Chore):
            return 0.0
        if isinstance(part, Measuring):
            return sum(map(self._flops, part.does))
        if isinstance(part, Training):
            schedule = schedule_of(part, self.spread.processes)
            return schedule.steps * schedule.rows_a_step * _row_flops(part)
        return (part.rows if isinstance(part, Reading) else part.prompts) * _row_flops(part)

    # ---- memory

    def _add_memory(
        self, found: Estimate, parts: list[Part], peak: float | None, base: float, of_chores: float
    ) -> None:
        """The part that takes most. Where it was measured, what the parts do not tell is `rest`."""
        if not any(isinstance(part, Training | Reading | Writing) for part in parts):
            found.memory = {"libraries": base + OF_MEASURING, "data": of_chores}
            return
        trainings = [part for part in parts if isinstance(part, Training)]
        of_parts = [self._memory(part) for part in trainings]
        of_parts += [memory.of_model(part) for part in parts if isinstance(part, Reading | Writing)]
        most = max(of_parts, key=lambda each: sum(each.values()), default={})
        found.memory = {**most, "libraries": base}
        if peak is not None and self.spread.processes == 1:
            rest = peak - found.peak
            if rest < 0:  # they are not all there at the same time
                most = {name: size * max(peak - base, 0) / max(sum(most.values()), 1) for name, size in most.items()}
            found.memory = {**most, "libraries": base, "rest": max(rest, 0)}
        found.memory |= {"data": of_chores} if self.machine.is_cpu else {}
        for training in trainings:
            total = self.total(training, self.spread, base)
            if total > self.machine.memory:
                fits = functools.partial(self.total, base=base)
                found.change = memory.first_that_fits(training, self.spread, self.machine, fits)

    def _memory(self, training: Training) -> Memory:
        schedule = schedule_of(training, self.spread.processes)
        return memory.of_training(training, self.spread, self._is_half(schedule), self.machine.is_cpu)

    def total(self, training: Training, spread: Spread, base: float) -> float:
        """Bytes that a device needs, or the processor's memory for all processes."""
        schedule = schedule_of(training, spread.processes)
        found = memory.of_training(training, spread, self._is_half(schedule), self.machine.is_cpu)
        if self.machine.is_cpu:
            return (sum(found.values()) + base) * spread.processes
        return sum(found.values()) * FRAGMENTS + base

    def _is_half(self, schedule: Schedule) -> bool:
        return (self.spread.precision or schedule.precision or self.precision) != "fp32"


def _left_in_pieces(parts: list[Any]) -> float:
    """The share of its memory that a training asks for once more on a CPU, where sizes differ so much that what was
    freed serves less and less, which the few steps of a rehearsal do not show: measured on the recipes here."""
    trainings = [part for part in parts if isinstance(part, Training)]
    if any(each.lengths.padded_to is None for each in trainings):
        return 0.9  # batches of many lengths
    if any(isinstance(read, Writing) for each in trainings for read in each.at_evaluations):
        return 0.6  # texts between the steps
    return 0.45 if len(trainings) > 1 else 0.0


def _flat(parts: Any) -> Any:
    """The parts, and those of evaluations during trainings behind their training."""
    for part in parts:
        yield part
        if isinstance(part, Training):
            yield from part.at_evaluations


def _row_flops(part: Training | Reading | Writing) -> float:
    """Of one row, or one text."""
    if isinstance(part, Writing):
        length = part.prompt_tokens + part.new_tokens
        return length * shape_of(part.model, length).forward_flops
    length = part.lengths.longest
    tokens = length if part.lengths.padded_to else part.lengths.mean
    shape = shape_of(part.model, length)
    if isinstance(part, Reading):
        return tokens * shape.forward_flops
    of_teacher = shape_of(part.teacher, length).forward_flops if part.teacher is not None else 0
    return tokens * (shape.training_flops + of_teacher)


def _checkpoint_bytes(training: Training) -> float:
    shape = shape_of(training.model, 8)
    moments = 8 * shape.trained - (4 * shape.matrices if training.optimizer == "muon" else 0)
    return 4 * (shape.parameters if training.model.lora is None else shape.trained) + moments


def _of_speeds(model: Model) -> list[Reading | Writing]:
    """What `hfkit.evaluation.costs` measures, and the samples."""
    if model.classes:
        lengths = Lengths((SPEED_PROMPT,), 0)
        return [Reading("speed", model, SPEED_TIMES * (1 + SPEED_BATCH), lengths, SPEED_BATCH)]
    one, several = (
        Writing("speed", model, rows, SPEED_PROMPT, SPEED_TIMES * SPEED_TOKENS, rows, is_generate=True)
        for rows in (1, SPEED_BATCH)
    )
    return [one, several, Writing("samples", model, SAMPLES, SPEED_PROMPT, SAMPLE_TOKENS, SAMPLES)]


# ---- rehearsals, each once


class _Parts:
    """Parts that are to be rehearsed, the same where they are of the same sizes."""

    def __init__(self, parts: list[Any], limits: tuple[int, ...]):
        self.parts, self.limits = parts, limits
        self.key = repr([[_described(part), rows] for part, rows in zip(parts, limits, strict=True)])

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Parts) and self.key == other.key


def _described(part: Any) -> list[Any]:
    """What a rehearsal depends on, in words."""
    values = {each.name: getattr(part, each.name) for each in dataclasses.fields(part)}
    return [
        type(part).__name__,
        *(
            f"{name}={value.key if isinstance(value, Model) else value}"
            for name, value in values.items()
            if name not in ("at_evaluations", "what")
        ),
    ]


@functools.lru_cache(maxsize=64)
def _rehearse(asked: _Parts, precision: str) -> Any:
    return process.call("rehearse", asked.parts, precision, list(asked.limits))
