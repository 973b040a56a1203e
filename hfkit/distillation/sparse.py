"""A teacher's distributions by a few of their entries: drawn from them, or the likeliest ones."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfkit.artifacts.manifest import Metrics
from hfkit.data.rows.packing import IGNORED
from hfkit.errors import HfkitError

CPU_BLOCK, GPU_BLOCK = 1 << 18, 1 << 26  # probabilities at a time; on a CPU what its caches hold is many times faster

# The logits of the learned positions of a batch in their order, a few at a time: each (some, vocabulary). The
# batch is on the CPU, the logits are on the teacher's device.
LogitsOf = Callable[[dict[str, Tensor]], Iterator[Tensor]]


class Sparse(NamedTuple):
    """Entries of some distributions, one after the other.

    Attributes:
        ids: tokens, (entries,), different ones in each distribution.
        weights: their probabilities, or how often each was drawn, (entries,).
        sizes: the number of entries of each distribution, (tokens,).
    """

    ids: np.ndarray
    weights: np.ndarray
    sizes: np.ndarray


def sparse(
    logits: Tensor,
    method: Literal["sampled", "top_k"],
    entries: int,
    temperature: float,
    generator: torch.Generator,
) -> Sparse:
    """Return some entries of softmax(logits / temperature), of logits (tokens, vocabulary).

    Args:
        entries: draws of `sampled`, k of `top_k`.
        generator: on the CPU.

    Raises:
        HfkitError: if logits are not finite. -inf is taken as a probability of 0.
    """
    parts = []
    for some in logits.split(max(1, (CPU_BLOCK if logits.device.type == "cpu" else GPU_BLOCK) // logits.shape[1])):
        probabilities = torch.softmax(some.float() / temperature, dim=-1)
        if probabilities[:, 0].isnan().any():
            raise HfkitError("teacher: its logits are not finite, so that there is nothing to learn; choose another")
        selection = draw(probabilities, entries, generator) if method == "sampled" else top_k(probabilities, entries)
        parts.append([array.cpu().numpy() for array in selection])
    return Sparse(*map(np.concatenate, zip(*parts, strict=True)))


def draw(probabilities: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens from distributions (tokens, vocabulary), with replacement.

    The draws are stratified: one from each of `draws` equal slices of the cumulative distribution (Kitagawa, 1996,
    "Monte Carlo Filter and Smoother"). A token's expected count is draws * p, as of independent draws; the variance of
    a sum over the draws is never above that of independent ones (of the default teacher, 50 are as good as 109); and
    they come sorted. The cumulative sums are in float64: the rounding of float32 would move up to 0.1 % of the
    probability in a large vocabulary.

    Args:
        generator: on the CPU, so that every device draws the same.

    Returns:
        `ids`, counts and `sizes` as in `Sparse`.
    """
    tokens, width = probabilities.shape
    cumulative = probabilities.to(torch.float64, copy=True).cumsum_(-1)
    offsets = torch.rand(tokens, draws, dtype=torch.float64, generator=generator) + torch.arange(draws)
    points = (offsets / draws).to(cumulative.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, points, right=True).clamp_max(width - 1)  # (tokens, draws)
    first = width * torch.arange(tokens, device=ids.device)[:, None]  # tells the distributions apart
    unique, counts = torch.unique_consecutive(ids + first, return_counts=True)
    return unique % width, counts, torch.bincount(unique // width, minlength=tokens)


def top_k(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the likeliest tokens of distributions (tokens, vocabulary): `ids`, probabilities and `sizes` as in
    `Sparse`."""
    values, ids = probabilities.topk(k)
    return ids.flatten(), values.flatten(), torch.full((len(ids),), k)


def measure_bias(
    logits_of: LogitsOf, rows: Any, temperature: float, steps: tuple[int, ...] = (256, 1024, 4096)
) -> Metrics:
    """Return how far stored targets are from the teacher's distributions, as total variation: half the sum of the
    absolute differences, 0 to 1.

    Noise averages out over positions, bias does not: the distance between the mean target and the mean distribution
    of n positions falls like 1 / sqrt(n) where targets are unbiased, and stays where they are not. The mean target is
    scaled to sum to 1: it is what a student learns that cannot tell the positions apart.

    Args:
        rows: rows with `target_ids` and `target_probabilities`. Some are taken in an order that is always the same.
        steps: numbers of positions after which the distance of the means is told.

    Returns:
        `positions`, the `total_variation` between the means of so many, and `per_token`, that of a position's own
        target.
    """
    sums: Any = torch.zeros(2, 1, dtype=torch.float64)
    count, apart, results = 0, 0.0, list[tuple[int, float]]()
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist():
        batch = {name: value[None] for name, value in rows[index].items()}
        learned = batch["labels"][0, 1:] != IGNORED
        ids, stored = (batch.pop(f"target_{name}")[0, :-1][learned] for name in ("ids", "probabilities"))
        start = count
        for logits in logits_of(batch) if learned.any() else ():
            teacher = torch.softmax(logits.double() / temperature, dim=-1).cpu()
            some = slice(count - start, count - start + len(teacher))
            target = torch.zeros_like(teacher).scatter_add_(1, ids[some], stored[some].double())
            sums = sums + torch.stack([teacher.sum(0), target.sum(0)])  # (2, vocabulary)
            apart += (teacher - target).abs().sum().item() / 2
            count += len(teacher)
        if count >= steps[len(results)]:
            means = sums / sums.sum(1, keepdim=True)
            results.append((count, (means[0] - means[1]).abs().sum().item() / 2))
        if len(results) == len(steps):
            break
    positions, distances = zip(*results, strict=True) if results else ((), ())
    return {"positions": positions, "total_variation": distances, "per_token": apart / max(count, 1)}
