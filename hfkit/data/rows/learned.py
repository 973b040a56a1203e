"""Where a batch has predictions to learn, and where its documents begin, noted while it is made: a GPU that is asked
later has to finish first."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hfkit.artifacts.manifest import Json
from hfkit.data.rows.packing import IGNORED
from hfkit.recipe.fields import Arguments

LEARNED = "learned"  # of a batch: `places` of its labels
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # what flash attention is told
Collate = Callable[[list[Any]], dict[str, torch.Tensor]]


def places(labels: torch.Tensor) -> torch.Tensor:
    """Return the places (some,) in flat (batch, tokens) whose next token is learned."""
    is_learned = torch.zeros_like(labels, dtype=torch.bool)
    is_learned[:, :-1] = labels[:, 1:] != IGNORED
    return is_learned.flatten().nonzero()[:, 0]


def taken(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return the values (some, ...) at some places, of (batch, tokens, ...)."""
    return values.flatten(0, 1).index_select(0, at)


def bounds(position_ids: torch.Tensor) -> Arguments:
    """Return the `BOUNDS` of packed documents, whose positions (batch, tokens) begin at 0.

    By itself transformers finds the documents in batches of one row only; in larger ones flash attention would look
    across all of a row.
    """
    starts = (position_ids.flatten() == 0).nonzero()[:, 0]
    ends = torch.cat([starts, torch.tensor([position_ids.numel()])]).to(torch.int32)
    longest = position_ids.shape[1]  # a bound for all batches: code that is compiled for one length stays
    return dict(zip(BOUNDS, (ends, ends, longest, longest), strict=True))


def noting(collate: Collate, with_bounds: bool = False) -> Collate:
    """Return a collator whose batches also hold their places, last, and before them the bounds of packed documents."""
    return partial(_noted, collate, with_bounds)


def _noted(collate: Collate, with_bounds: bool, rows: list[Any]) -> Json:
    batch = collate(rows)
    more = bounds(batch["position_ids"]) if with_bounds and "position_ids" in batch else {}
    return {**batch, **more, LEARNED: places(batch["labels"])}
