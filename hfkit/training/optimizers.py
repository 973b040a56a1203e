"""Optimizers that Trainer does not have."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings, head and vectors; one learning rate for both.

    Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix. Its steps
    are scaled to the size of AdamW's (`match_rms_adamw`, arXiv 2502.16982), so that the two share a learning rate and
    a weight decay. Both are torch's own implementations; this class shows them to schedulers and checkpoints as one.

    Args:
        muon_params: matrices (out, in).
        adamw_groups: parameter groups of AdamW, as Trainer makes them.
        muon_kwargs, adamw_kwargs: further arguments of `torch.optim.Muon` and `torch.optim.AdamW`.
    """

    def __init__(
        self,
        muon_params: list[nn.Parameter],
        adamw_groups: list[dict[str, Any]],
        muon_kwargs: dict[str, Any],
        adamw_kwargs: dict[str, Any],
    ):
        self.muon = torch.optim.Muon(muon_params, adjust_lr_fn="match_rms_adamw", **muon_kwargs)
        self.adamw = torch.optim.AdamW(adamw_groups, **adamw_kwargs)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the two work on the groups and the state of this one."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.state = defaultdict(dict, self.state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: a matrix that is neither an embedding nor a head."""
    outside = ("embed_tokens", "embed_positions", "lm_head", "score", "classifier")
    return parameter.ndim == 2 and not any(part in outside for part in name.split("."))
