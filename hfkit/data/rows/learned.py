"""Where a batch has predictions to learn, noted while it is made: a GPU that is asked later has to finish first."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hfkit.data.rows.packing import IGNORED

LEARNED = "learned"  # of a batch: `places` of its labels
Collate = Callable[[list[Any]], dict[str, torch.Tensor]]


def places(labels: torch.Tensor) -> torch.Tensor:
    """The places (some,) in flat (batch, tokens) whose next token is learned."""
    is_learned = torch.zeros_like(labels, dtype=torch.bool)
    is_learned[:, :-1] = labels[:, 1:] != IGNORED
    return is_learned.flatten().nonzero()[:, 0]


def taken(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The values (some, ...) at some places, of (batch, tokens, ...)."""
    return values.flatten(0, 1).index_select(0, at)


def noting(collate: Collate) -> Collate:
    """A collator whose batches also hold their places, last."""
    return partial(_noted, collate)


def _noted(collate: Collate, rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    return {**batch, LEARNED: places(batch["labels"])}
