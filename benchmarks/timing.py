"""When the steps of a training ended, and what memory they took, for the scripts beside this one."""

import gc
import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Seconds on a clock at the begin of the training and at the end of each step, once a GPU has done it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds of each step."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    def median(self, warm_up: int) -> float:
        """The median of the steps after the first `warm_up`, which compile."""
        return statistics.median(self.steps()[warm_up:])


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def forget_peak() -> int:
    """Let the peak of the GPU's memory begin now, without what earlier work has left there; the bytes in use."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()  # a Trainer is part of circles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak() -> int:
    """The most bytes in use since then."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
