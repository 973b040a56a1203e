"""How many steps, evaluations and checkpoints a training has, by its `TrainingArguments`."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

from hfkit.planning.work import Training
from hfkit.training.decisions import COMPILE_GAIN, COMPILE_SECONDS
from hfkit.training.trainer import training_arguments

KEPT_CHECKPOINTS = 2  # and one that is being written


@dataclasses.dataclass(frozen=True)
class Schedule:
    """
    Args:
        batch, accumulation: rows of a pass on one process, and passes of a step.
        steps, evaluations, saves: how often.
        rows_a_step: of all processes.
        checkpoints: how many are on the disk at most.
        checkpointing: whether activations are computed again in the backward pass.
        precision: bf16, fp16 or fp32 where the recipe says it; None leaves it to hfkit.
        compiles: what the recipe says; None leaves it to hfkit.
    """

    batch: int
    accumulation: int
    steps: int
    evaluations: int
    saves: int
    rows_a_step: int
    checkpoints: int
    checkpointing: bool
    precision: str | None
    compiles: bool | None


def schedule_of(training: Training, processes: int) -> Schedule:
    args: Any = training_arguments(training.train, Path("unused"))
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    rows_a_step = batch * accumulation * processes
    a_epoch = math.ceil(max(training.rows, 1) / rows_a_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * a_epoch)
    epochs = math.ceil(steps / a_epoch)
    evaluations = _times(args.eval_strategy, args.eval_steps or args.logging_steps, steps, epochs)
    saves = _times(args.save_strategy, args.save_steps, steps, epochs)
    if args.save_strategy == "steps" and steps % max(args.save_steps, 1):
        saves += 1  # Trainer saves at the end too
    precision = None
    if args.mixed_precision in ("bf16", "fp16"):
        precision = str(args.mixed_precision)
    elif "bf16" in training.train:
        precision = "fp32"
    kept = args.save_total_limit or KEPT_CHECKPOINTS
    return Schedule(
        batch=batch,
        accumulation=accumulation,
        steps=steps,
        evaluations=evaluations + (1 if args.eval_on_start else 0),
        saves=saves,
        rows_a_step=rows_a_step,
        checkpoints=min(saves, kept + 1),
        checkpointing=bool(args.gradient_checkpointing),
        precision=precision,
        compiles=training.train.get("torch_compile"),
    )


def _times(strategy: str, every: float, steps: int, epochs: int) -> int:
    """How often something is done. Below 1, `every` is a share of all steps."""
    if strategy == "epoch":
        return epochs
    if strategy in ("steps", "best") and every:
        return steps // max(math.ceil(steps * every) if every < 1 else int(every), 1)
    return 0


def compiles(schedule: Schedule, pass_seconds: float, is_cpu: bool) -> bool:
    """What `hfkit.training.decisions` will decide, by the time of one pass."""
    if schedule.compiles is not None:
        return bool(schedule.compiles)
    if is_cpu and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return False
    return schedule.steps * schedule.accumulation * pass_seconds * COMPILE_GAIN > COMPILE_SECONDS
