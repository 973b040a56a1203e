"""The next token of rows that each have rules and a generator of their own."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """How a row's tokens are chosen.

    Args:
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: the smallest set of tokens with at least this probability is sampled from (Holtzman et al. 2020).
        top_k: so many of the likeliest tokens are sampled from; 0 for all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def choose(logits: torch.Tensor, rules: Sequence[Sampling], generators: Sequence[random.Random]) -> list[int]:
    """Return the next token of each row. A row's draws are its generator's alone, whatever else is in the batch.

    Args:
        logits: (rows, vocabulary), float32.
        rules: of each row.
        generators: of each row.
    """
    tokens = logits.argmax(-1).tolist()
    sampled = [row for row, rule in enumerate(rules) if rule.temperature > 0]
    if not sampled:
        return tokens
    chosen = [rules[row] for row in sampled]
    scores = logits[sampled] / torch.tensor([[rule.temperature] for rule in chosen], device=logits.device)
    order = None
    if any(rule.top_p < 1 or rule.top_k for rule in chosen):
        scores, order = scores.sort(-1, descending=True)
        scores = _cut(scores, chosen)
    drawn = torch.tensor([[generators[row].random()] for row in sampled], dtype=torch.float64, device=logits.device)
    sums = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    places = torch.searchsorted(sums, drawn * sums[:, -1:], right=True).clamp(max=sums.shape[-1] - 1)
    if order is not None:
        places = order.gather(-1, places)
    for row, token in zip(sampled, places[:, 0].tolist(), strict=True):
        tokens[row] = token
    return tokens


def _cut(scores: torch.Tensor, rules: list[Sampling]) -> torch.Tensor:
    """Set what top_k and top_p leave out to minus infinity. `scores` (rows, vocabulary) are sorted, the best first."""
    size = scores.shape[-1]
    counts = torch.tensor([[rule.top_k or size] for rule in rules], device=scores.device)
    scores = scores.masked_fill(torch.arange(size, device=scores.device) >= counts, -torch.inf)
    shares = torch.tensor([[rule.top_p] for rule in rules], dtype=torch.float64, device=scores.device)
    probabilities = scores.softmax(-1, dtype=torch.float64)
    before = probabilities.cumsum(-1) - probabilities  # the first token stays, whatever top_p is
    return scores.masked_fill((before >= shares) & (torch.arange(size, device=scores.device) > 0), -torch.inf)
