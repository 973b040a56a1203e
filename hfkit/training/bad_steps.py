"""Steps with bad numbers: seen before the weights are touched, left out, counted, told."""

import dataclasses
import math

import numpy as np

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
        """What is wrong with a step, or None for a good one.

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
