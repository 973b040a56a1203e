"""Work on many rows of tokens: like lengths together, on all processes, exactly one result for each."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hfkit.model.heads import portable_attention
from hfkit.runtime.bars import Bar
from hfkit.runtime.distributed import of_all, rank, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Results = Iterable[tuple[int, Any]]


@torch.no_grad()
def dealt(
    model: "PreTrainedModel", rows: list[list[int]], of_rows: Callable[[list[int]], Results], title: str
) -> list[Any]:
    """A result for each row, in the order of the rows. Call it on every process.

    The rows are sorted by length, the longest first, and dealt to the processes in turn. The processes that share one
    sharded model make all their forward passes together, so there each takes all rows, with the same random draws.

    Args:
        of_rows: from the indices of a process's rows to pairs of an index and its result, which must be JSON, in the
            order in which they are done.
    """
    together = world_size() > 1 and _is_sharded(model)
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    order = order if together else order[rank() :: world_size()]
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(enabled=together), portable_attention(model):
        if together:
            torch.manual_seed(0)
        bar = Bar(of_rows(order), title, total=len(order))
        found = list(bar)
    model.train(was_training)
    results = dict(pair for share in of_all(title, found) for pair in share)
    return [results[index] for index in range(len(rows))]


def _is_sharded(model: "PreTrainedModel") -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from transformers.integrations import is_deepspeed_zero3_enabled

    kinds = (FSDPModule, FullyShardedDataParallel)
    return is_deepspeed_zero3_enabled() or any(isinstance(module, kinds) for module in model.modules())


def in_batches(
    model: "PreTrainedModel",
    rows: list[list[int]],
    of_batch: Callable[[list[int]], list[Any]],
    batch_size: int,
    title: str,
) -> list[Any]:
    """A result for each row, in the order of the rows, from batches of like length. Call it on every process.

    Args:
        of_batch: from the indices of some rows to one result each, which must be JSON.
    """

    def of_rows(order: list[int]) -> Results:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield from zip(chosen, of_batch(chosen), strict=True)

    return dealt(model, rows, of_rows, title)


def padded(rows: list[list[int]], value: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one tensor, and its mask of what is not padding, each (batch, longest)."""
    tensors = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in tensors]
    return pad_sequence(tensors, True, value, side), pad_sequence(ones, True, 0, side)
