"""Steps with bad numbers: seen before the weights are touched, left out, counted, told."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from hfkit.artifacts.manifest import Metrics
from hfkit.errors import HfkitError
from hfkit.runtime import signals
from hfkit.runtime.distributed import is_main, say
from hfkit.training import checkpoints
from hfkit.training.settings import BadSteps

RECENT_STEPS = 100  # whose gradient norms a spike is held against
FEWEST_STEPS = 20  # before there is a mean to speak of


@dataclasses.dataclass
class StepGuard:
    """Judges every step by its loss and gradient norm, and counts what it leaves out."""

    settings: BadSteps
    skipped: int = 0
    in_a_row: int = 0
    norms: list[float] = dataclasses.field(default_factory=list)

    def judge(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step, or None for a good one.

        Args:
            loss: of the step on any process where it is not finite.
            norm: of the gradient of all trained parameters, before clipping.
        """
        reason = self._reason(loss, norm)
        if reason is None:
            self.in_a_row = 0
            self.norms = [*self.norms[1 - RECENT_STEPS :], norm]
        else:
            self.in_a_row += 1
            self.skipped += 1
        return reason

    @property
    def is_exhausted(self) -> bool:
        return self.in_a_row >= self.settings.stop_after

    def _reason(self, loss: float, norm: float) -> str | None:
        bad = [
            f"{name} is {value}"
            for name, value in (("loss", loss), ("gradient norm", norm))
            if not math.isfinite(value)
        ]
        if bad:
            return " and ".join(bad)
        sigma = self.settings.spike_sigma
        if sigma is None or len(self.norms) < FEWEST_STEPS:
            return None
        mean, deviation = float(np.mean(self.norms)), float(np.std(self.norms))
        if norm <= mean + sigma * deviation:
            return None
        above = (norm - mean) / deviation if deviation else math.inf
        return f"gradient norm is {norm:.3g}, {above:.1f} sigma above its recent mean of {mean:.3g}"


class GuardedTrainer(Trainer):
    """Trainer that leaves bad steps out. Its log tells them, and the mean loss of the good ones."""

    def __init__(self, model: nn.Module, args: TrainingArguments, bad_steps: BadSteps | None = None, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.guard = StepGuard(bad_steps or BadSteps())
        self._loss_at_step_begin: torch.Tensor | None = None
        self._norm = torch.tensor(0.0)  # of the last step
        self._logged_step = self._skipped_since_log = 0
        self._bad: str | None = None  # what was wrong with the step that was just left out
        self._is_stopping = False  # a process was asked to stop
        if self.is_deepspeed_enabled:
            say("  DeepSpeed updates the weights inside its backward pass: bad steps are told, but not left out")

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._loss_at_step_begin is None:
            self._loss_at_step_begin = self._tr_loss.clone()
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Skip a bad step. Trainer calls this between the last backward pass of a step and the optimizer.

        This waits for the device, once a step. All processes decide alike: they share what they have seen.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = self._tr_loss - self._loss_at_step_begin
        norm = torch.as_tensor(grad_norm, device=loss.device, dtype=torch.float32)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_asked = torch.tensor(signals.requested() is not None, device=loss.device)
        indicators = torch.stack([loss.isnan(), loss.isinf(), norm.isnan(), norm.isinf(), is_asked]).float()
        share = norm.nan_to_num(0.0, 0.0, 0.0) / self.args.world_size
        *flags, mean_norm = self.accelerator.reduce(torch.cat([indicators, share[None]]), "sum").tolist()
        loss_is_nan, loss_is_inf, norm_is_nan, norm_is_inf, self._is_stopping = map(bool, flags)
        self._bad = self.guard.judge(
            math.nan if loss_is_nan else math.inf if loss_is_inf else 0.0,
            math.nan if norm_is_nan else math.inf if norm_is_inf else mean_norm,
        )
        if self._bad:
            self._tr_loss.copy_(self._loss_at_step_begin)
            self._skipped_since_log += 1
            # Without gradients no optimizer does anything, not even decay weights or moments.
            model.zero_grad(set_to_none=True)
            scaler = self.accelerator.scaler
            if scaler is not None and not (loss_is_nan or loss_is_inf) and scaler.get_scale() > 1:
                self.guard.in_a_row = 0  # fp16 is looking for its scale
        self._loss_at_step_begin = None
        self._norm = norm
        return grad_norm

    def _tell_bad_step(self) -> None:
        reason, self._bad = self._bad, None
        limit, step = self.guard.settings.stop_after, self.state.global_step
        is_log_due = self.control.should_log
        self.log({"skipped": reason, "skipped_steps": self.guard.skipped})
        self.control.should_log = is_log_due
        if is_main():
            tqdm.write(
                f"  skipped step {step}: {reason} ({self.guard.in_a_row} of {limit} consecutive before stopping)"
            )
        if self.guard.is_exhausted:
            last = checkpoints.last(Path(self.args.output_dir))
            raise HfkitError(
                f"{self.args.output_dir}: {limit} steps in a row were left out, up to step {step}: {reason}. "
                f"The weights are those after step {step - limit}; the last good checkpoint is "
                f"{last or 'not yet written'}.\n"
                f"  Lower train.learning_rate or train.max_grad_norm, or look for what is odd in the data; then "
                f"add --force to go on from that checkpoint with the changed recipe, or --fresh to begin again."
            )

    def log(self, logs: Metrics, start_time: float | None = None) -> None:
        if "loss" in logs:
            steps = self.state.global_step - self._logged_step
            good = steps - self._skipped_since_log
            if self._skipped_since_log:  # Trainer has divided by all steps
                loss = logs.pop("loss")
                logs |= {"loss": loss * steps / good} if good else {}
                logs["skipped_steps"] = self.guard.skipped
            self._logged_step, self._skipped_since_log = self.state.global_step, 0
        super().log(logs, start_time)
