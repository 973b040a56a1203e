"""What the work of models takes: a training by a rehearsal on this machine, all else from FLOPs."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from hfkit.planning import memory, process
from hfkit.planning.estimate import A_LAUNCH, FRAGMENTS, Costs, Estimate, Speeds
from hfkit.planning.machines import Machine, Prices, Spread
from hfkit.planning.memory import Memory
from hfkit.planning.schedule import Schedule, compiles, schedule_of
from hfkit.planning.shapes import shape_of
from hfkit.planning.work import (
    Chore,
    Lengths,
    Measuring,
    Model,
    Part,
    Reading,
    Rehearsed,
    Steps,
    Training,
    Work,
    Writing,
)
from hfkit.training.decisions import COMPILE_SECONDS

OF_MEASURING = 6e7  # bytes of the metrics, beside the libraries of a training
PASS_SECONDS = 1.0  # a rehearsal's pass may take so long; else it has fewer rows, or there is none
COMPILED = 0.92  # of a pass's time on a CPU, see benchmarks/results/pretrain_speed_cpu_bf16.json
ROOM = 0.6  # of the free memory that a rehearsal may take
SETTING_UP = 0.6  # in the time that the libraries take to load: what a training loads beside them, and its report
WRITTEN_A_SECOND = 200e6  # bytes of a checkpoint, with their digests
A_SAVE = 0.25  # seconds of each
LAYER_SECONDS = 4e-4  # for a layer forward, however small: kernels are launched one by one
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
    reached: float
    precision: str

    def estimate(self, work: Work) -> Estimate:
        found = Estimate(disk=work.disk + work.cache)
        trainings = [part for part in work.parts if isinstance(part, Training)]
        done = self._rehearsed(trainings) if self.machine.is_here and trainings else None
        found.is_measured = done is not None
        steps = iter(done.steps if done is not None else [self._foreseen(part) for part in trainings])
        share = self.reached if done is None else self._share(trainings[0], done.steps[0])
        for part in work.parts:
            found.flops += self._flops(part)
            if isinstance(part, Training):
                self._add_training(found, part, next(steps), share)
            else:
                found.add(part.what, self._seconds(part, share))
        if any(isinstance(part, Measuring) for part in work.parts):
            found.add("starting the measurements", self.speeds.imports if self.machine.is_here else A_LAUNCH)
        self._add_memory(found, list(_flat(work.parts)), done, work.left_behind)
        return found

    # ---- time

    def _share(self, part: Training, taken: Steps) -> float:
        """The share of the peak that a training reaches, and what reads and writes beside it."""
        return schedule_of(part, 1).batch * _row_flops(part) / (taken.of_pass * self.machine.flops)

    def _rehearsed(self, trainings: list[Training]) -> Rehearsed | None:
        """What a rehearsal gives, scaled to whole batches; None where one would take too long or too much memory."""
        import psutil

        limits = [self._rows_that_fit(part) for part in trainings]
        if not all(limits):
            return None
        needed = max(sum(self._memory(part).values()) for part in trainings)
        if needed > ROOM * psutil.virtual_memory().available and self.machine.is_cpu:
            return None
        done: Rehearsed | None = process.call("rehearse", trainings, self.precision, limits)
        if done is None:
            return None
        scaled, extra = [], 0.0
        for part, taken, rows in zip(trainings, done.steps, limits, strict=True):
            batch = schedule_of(part, self.spread.processes).batch
            share = batch / rows * (self.spread.processes if self.machine.is_cpu else 1)
            scaled.append(dataclasses.replace(taken, of_pass=taken.of_pass * share))
            kept = self._memory(part)
            extra = max(extra, (kept["activations"] + kept["logits"]) * (1 - rows / batch))
        return Rehearsed(scaled, done.peak + extra, done.base)

    def _rows_that_fit(self, part: Training) -> int:
        """Rows of a batch that a rehearsal's pass can take; 0 for none."""
        a_row = _row_flops(part) / (self.speeds.flops * self.reached)
        return min(schedule_of(part, 1).batch, int(PASS_SECONDS / a_row))

    def _foreseen(self, part: Training) -> Steps:
        """What a rehearsal would give, from FLOPs."""
        launch = shape_of(part.model, 8).layers * LAYER_SECONDS
        if part.teacher is not None:
            launch += shape_of(part.teacher, 8).layers * LAYER_SECONDS / 3
        rows = schedule_of(part, self.spread.processes).batch * (self.spread.processes if self.machine.is_cpu else 1)
        of_pass = max(rows * _row_flops(part) / (self.machine.flops * self.reached), 3 * launch)
        return Steps(of_pass, 12 * shape_of(part.model, 8).trained / self.machine.bandwidth + launch / 2, 0.0)

    def _seconds(self, part: Chore | Reading | Writing | Measuring, share: float) -> float:
        """From FLOPs and the share of the peak that is reached; of a batch at least what launching kernels takes."""
        if isinstance(part, Chore):
            return part.seconds
        speed, shape = self.machine.flops * share, shape_of(part.model, 8)
        launch = shape.layers * LAYER_SECONDS
        if isinstance(part, Measuring):
            does = [*_of_speeds(part.model), *part.does]
            return 0.2 + shape.weight_bytes / 1e9 + sum(self._seconds(each, share) for each in does)
        if isinstance(part, Reading):
            return max(part.rows * _row_flops(part) / speed, math.ceil(part.rows / part.batch) * launch)
        steps = math.ceil(part.prompts / part.batch) * part.new_tokens
        return part.prompts * _row_flops(part) / speed + steps * (shape.weight_bytes / self.machine.bandwidth + launch)

    def _add_training(self, found: Estimate, part: Training, taken: Steps, share: float) -> None:
        schedule = schedule_of(part, self.spread.processes)
        shape = shape_of(part.model, part.lengths.longest)
        of_pass = taken.of_pass
        is_compiled = compiles(schedule, of_pass, self.machine.is_cpu)
        if is_compiled and self.machine.is_cpu:
            of_pass *= COMPILED
        found.add(part.what, schedule.steps * (schedule.accumulation * of_pass + taken.of_optimizer))
        if is_compiled:
            found.add("compiling", COMPILE_SECONDS)
        for each in part.at_evaluations:
            found.add(each.what, schedule.evaluations * self._seconds(each, share))
        checkpoint = _checkpoint_bytes(part)
        if schedule.saves:
            found.add("saving", schedule.saves * (A_SAVE + checkpoint / WRITTEN_A_SECOND))
        imports = self.speeds.imports if self.machine.is_here else A_LAUNCH
        found.add("setting up", taken.before + SETTING_UP * imports)
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
            of_evaluations = sum(map(self._flops, part.at_evaluations))
            return schedule.steps * schedule.rows_a_step * _row_flops(part) + of_evaluations
        return (part.rows if isinstance(part, Reading) else part.prompts) * _row_flops(part)

    # ---- memory

    def _add_memory(self, found: Estimate, parts: list[Part], done: Rehearsed | None, of_chores: float) -> None:
        """The part that takes most. Where it was measured, what the parts do not tell is `rest`."""
        base = self.speeds.libraries if done is None else done.base
        if not any(isinstance(part, Training | Reading | Writing) for part in parts):
            found.memory = {"libraries": base + OF_MEASURING, "data": of_chores}
            return
        trainings = [part for part in parts if isinstance(part, Training)]
        of_parts = [self._memory(part) for part in trainings]
        of_parts += [memory.of_model(part) for part in parts if isinstance(part, Reading | Writing)]
        most = max(of_parts, key=lambda each: sum(each.values()), default={})
        found.memory = {**most, "libraries": base}
        if done is not None and self.spread.processes == 1:
            rest = done.peak - found.peak
            if rest < 0:  # they are not all there at the same time
                most = {
                    name: size * max(done.peak - base, 0) / max(sum(most.values()), 1) for name, size in most.items()
                }
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


def _flat(parts: Sequence[Part]) -> Iterator[Part]:
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
        Writing("speed", model, rows, SPEED_PROMPT, SPEED_TIMES * SPEED_TOKENS, rows) for rows in (1, SPEED_BATCH)
    )
    return [one, several, Writing("samples", model, SAMPLES, SPEED_PROMPT, SAMPLE_TOKENS, SAMPLES)]
