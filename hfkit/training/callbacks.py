"""What happens every N steps: the bar, the log file, the speed."""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json, Metrics
from hfkit.runtime.bars import duration
from hfkit.runtime.distributed import is_terminal, say
from hfkit.training.resumable import ResumableTrainer


class Speed(TrainerCallback):
    """Adds `tokens_per_second` and `mfu` to each log, and knows them for the whole run.

    Evaluation, saving and the first step, which compiles, do not count. A log has just waited for the device, so the
    time between two logs is honest on a GPU too.

    Args:
        tokens_per_step: tokens that all processes together read in a step.
        flops_per_token: training FLOPs a token.
        roof_flops: measured FLOP/s of a matrix product on all devices together.
    """

    def __init__(self, trainer: ResumableTrainer, tokens_per_step: int, flops_per_token: float, roof_flops: float):
        self.trainer = trainer
        self.tokens_per_step = tokens_per_step
        self.roof_tokens_per_second = roof_flops / flops_per_token
        self.tokens, self.seconds = 0, 0.0
        self.first_step_seconds: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.first_step_seconds is None:
            self.first_step_seconds = self._elapsed()
            self._mark(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or state.global_step == self.step:
            return
        tokens, seconds = (state.global_step - self.step) * self.tokens_per_step, self._elapsed()
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        logs["tokens_per_second"] = tokens / seconds
        logs["mfu"] = logs["tokens_per_second"] / self.roof_tokens_per_second
        self._mark(state)

    def summary(self) -> dict[str, float | None]:
        if not self.seconds:
            return {"tokens_per_second": None, "mfu": None}
        speed = self.tokens / self.seconds
        return {"tokens_per_second": speed, "mfu": speed / self.roof_tokens_per_second}

    def _mark(self, state: TrainerState) -> None:
        self.step, self.time, self.pauses = state.global_step, time.perf_counter(), self.trainer.pauses

    def _elapsed(self) -> float:
        return time.perf_counter() - self.time - (self.trainer.pauses - self.pauses)


def speed_lines(metrics: Metrics) -> list[str]:
    """Return how fast a model was trained, beside what the machine can do; nothing where that was not measured."""
    if not metrics["tokens_per_second"]:
        return []
    return [
        f"  trained at {metrics['tokens_per_second']:,.0f} tokens/s, "
        f"{metrics['mfu']:.0%} of the measured matmul peak, in {metrics['train_seconds']:,.0f} s"
    ]


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: a line a log. A resumed run first drops the lines of the steps that it repeats.

    A full disk does not stop the training: the lines wait in memory until there is room again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []
        self.logged: set[tuple[int, str | None]] = set()
        self.is_cut = False  # the last line may have been written in part

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            lines = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            self.logged = {(line["step"], _kind(line)) for line in lines}
            manifest.write_file(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if (state.global_step, _kind(logs)) in self.logged:
            return  # made again by a run that was stopped between it and its checkpoint
        words = {
            key: str(value) for key, value in logs.items() if isinstance(value, float) and not math.isfinite(value)
        }
        self.waiting.append(json.dumps({"step": state.global_step, **logs, **words}) + "\n")  # JSON has no NaN
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self.is_cut else "") + "".join(self.waiting))
            self.waiting.clear()
            self.is_cut = False
        except OSError as error:
            if not self.is_cut:
                say(f"  WARNING: {self.path}: {error.strerror}; the log waits in memory")
            self.is_cut = True


def _kind(line: Json) -> str | None:
    return next((key for key in ("skipped", "loss", "eval_loss") if key in line), None)


def read_log(path: Path) -> list[Metrics]:
    """Return the lines of a `metrics.jsonl`; one that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class TrainingBar(ProgressCallback):
    """Trainer's bar, with the newest numbers beside it instead of a line of them every log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        postfix = {"loss": f"{logs['loss']:.3f}"}
        if "tokens_per_second" in logs:
            postfix |= {"tok/s": f"{logs['tokens_per_second']:,.0f}", "of peak": f"{logs['mfu']:.0%}"}
        self.training_bar.set_postfix(postfix, refresh=False)


class TrainingLines(TrainerCallback):
    """What the bar shows, for a log file: a line per logging step, and one per evaluation."""

    def __init__(self) -> None:
        self.start: tuple[float, int] | None = None  # when, and the step; after the first one, which compiles

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.start is None:
            self.start = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        columns = [f"  step {state.global_step:,}/{state.max_steps:,}"]
        if "loss" in logs:
            columns.append(f"loss {logs['loss']:.3f}")
            if "tokens_per_second" in logs:
                columns.append(f"{logs['tokens_per_second']:,.0f} tok/s")
                columns.append(f"{logs['mfu']:.0%} of peak")
            say("  ".join([*columns, *self._left(state)]))
        elif "eval_loss" in logs:
            scores = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            numbers = [f"{key} {value:.4g}" for key, value in scores.items() if isinstance(value, float)]
            say("  ".join([*columns, "evaluation:", *numbers]))

    def _left(self, state: TrainerState) -> list[str]:
        """Return the time that the steps to come will take, evaluations and checkpoints as often as until now."""
        if self.start is None or state.global_step == self.start[1]:
            return []
        seconds = (time.perf_counter() - self.start[0]) / (state.global_step - self.start[1])
        return [f"{duration(seconds * (state.max_steps - state.global_step))} left"]


def watch(trainer: ResumableTrainer, speed: Speed, log: Path) -> None:
    """Put the callbacks in their order: the speed is in the log before it is written and shown."""
    shown = trainer.pop_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.callback_handler.callbacks.insert(0, speed)
    trainer.add_callback(MetricsFile(log))
    if shown is not None:
        trainer.add_callback(TrainingBar() if is_terminal() else TrainingLines())


def draw_loss(
    log: list[Metrics],
    path: Path,
    without_teacher: list[Metrics] | None = None,
    teacher: float | None = None,
) -> None:
    """Draw the training and the validation loss over the steps.

    Args:
        without_teacher: of a distilled student, the log of the same student without a teacher.
        teacher: its teacher's validation loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    curves = [(log, "loss", "training", "-"), (log, "eval_loss", "validation", "o-")]
    if teacher is not None:  # the training loss is that of the objective, on another scale
        curves = [(log, "eval_loss", "student, validation", "o-")]
        curves.append((without_teacher or [], "eval_loss", "the same without a teacher", "o--"))
        axes.axhline(teacher, color="gray", linewidth=1.2, linestyle=":", label="teacher")
    for lines, key, label, style in curves:
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
