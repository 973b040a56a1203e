"""Work on many rows of tokens: like lengths together, on all processes, exactly one result for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from hfkit.ranks import is_main, of_all, rank, world_size


@torch.no_grad()
def in_batches(
    model: Any, rows: list[list[int]], of_batch: Callable[[list[int]], list[Any]], batch_size: int, title: str
) -> list[Any]:
    """What `of_batch` gives for each row, in the order of the rows. Call it on every process.

    The rows are sorted by length, so that a batch is hardly padded, and dealt to the processes in turn.

    Args:
        of_batch: from the indices of some rows to one result each, which must be JSON.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))[rank() :: world_size()]
    was_training = model.training
    model.eval()
    found: list[tuple[int, Any]] = []
    bar = tqdm(total=len(order), desc=title, leave=False, mininterval=1, disable=not is_main())
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found += zip(chosen, of_batch(chosen), strict=True)
        bar.update(len(chosen))
    bar.close()
    model.train(was_training)
    results = dict(pair for share in of_all(title, found) for pair in share)
    return [results[index] for index in range(len(rows))]


def padded(rows: list[list[int]], value: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one tensor, and its mask of what is not padding, each (batch, longest)."""
    tensors = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in tensors]
    return pad_sequence(tensors, True, value, side), pad_sequence(ones, True, 0, side)
