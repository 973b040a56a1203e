"""What a run that goes on needs to know beside the state that Trainer keeps."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hfkit.artifacts import manifest


@dataclasses.dataclass
class Progress:
    """Kept in a checkpoint, one file a process."""

    guard: dict[str, Any]  # the counters of StepGuard
    logged_step: int  # of the last log
    loss_since: float  # sum of the losses of this process since then
    mean_loss_since: float  # the mean of these sums over the processes
    processes: int
    loss_before: float  # sum of the losses until then
    skipped_since: int  # steps left out since then
    norm: str  # of the gradient of the last step; JSON has no NaN
    learning_rate: float | None  # of the last step
    train_seconds: float
    is_evaluation_due: bool  # the run was stopped in the evaluation of this step
    is_save_due: bool  # and the recipe asks for a checkpoint after it
    is_epoch_end_due: bool  # this is the last step of an epoch, saved before the epoch's own end


def save_progress(progress: Progress, checkpoint: Path, process: int) -> None:
    manifest.write_json(checkpoint / f"progress_{process}.json", dataclasses.asdict(progress))


def load_progress(checkpoint: Path, process: int, processes: int) -> Progress:
    """Load the progress of a process; on another number of processes, each takes the mean."""
    first = manifest.read_json(checkpoint, "progress_0.json") or {}
    if first["processes"] != processes:
        return Progress(**{**first, "loss_since": first["mean_loss_since"]})
    return Progress(**(manifest.read_json(checkpoint, f"progress_{process}.json") or {}))


@contextlib.contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Preserve the state of the random numbers: training draws the same, whether there was an evaluation or not."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            yield
    else:
        with torch.random.fork_rng([device], device_type=device.type):
            yield
