"""How sure a score is, and whether one model's is better: resampling of rows."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from hfkit.errors import HfkitError

Combine = Callable[[np.ndarray], dict[str, float]]
NUMBERS_AT_ONCE = 4_000_000  # of weights in memory: 32 MB


class Difference(NamedTuple):
    """What system b has over system a in one score: the difference, its interval, and how likely chance makes it."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap(
    statistics: np.ndarray, combine: Combine, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return the percentile bootstrap interval of every score, over rows (Efron 1979; for BLEU, Koehn 2004).

    Args:
        statistics: (rows, k), whose sums over rows make the scores: of a likelihood, nats, tokens and bytes.
        combine: the scores by name of such sums, of shape (k,).
        samples: how many times the rows are drawn anew.
        seed: of the draws. The same seed draws the same rows for any statistics of as many rows.
        level: the share of intervals that hold the true score.

    Returns:
        Of each score its lower and upper bound.

    Raises:
        HfkitError: there are no rows, or `samples` or `level` is out of range.
    """
    statistics = _checked(statistics, samples, level)
    drawn = [combine(sums) for weights in _draws(len(statistics), samples, seed) for sums in weights @ statistics]
    return {name: _bounds([scores[name] for scores in drawn], level) for name in drawn[0]}


def paired_test(
    a: np.ndarray, b: np.ndarray, combine: Combine, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Difference]:
    """Return whether system b scores otherwise than system a on the same rows.

    The interval of the difference is from the paired bootstrap, which draws the same rows for both (Koehn 2004). The
    p-value is two-sided and from approximate randomisation (Noreen 1989; Riezler and Maxwell 2005): how often systems
    differ as much whose rows are swapped at random. It is at least 1 / (samples + 1), and 1 for identical systems.

    Args:
        a, b: (rows, k), the statistics of the same rows under either system.
        combine, samples, seed, level: as for `bootstrap`.

    Raises:
        HfkitError: as for `bootstrap`, or the two have not the same shape.
    """
    a, b = _checked(a, samples, level), _checked(b, samples, level)
    if a.shape != b.shape:
        raise HfkitError(
            f"paired test: the systems have statistics of {a.shape} and {b.shape} rows and columns, must be the same; "
            "score both on the same rows with the same options"
        )
    seen = _differences(a.sum(axis=0), b.sum(axis=0), combine)
    drawn, swapped = [], []
    for weights in _draws(len(a), samples, seed):
        pairs = zip(weights @ a, weights @ b, strict=True)
        drawn += [_differences(first, second, combine) for first, second in pairs]
    for signs in _swaps(len(a), samples, seed):
        moved = signs @ (b - a)
        pairs = zip(a.sum(axis=0) + moved, b.sum(axis=0) - moved, strict=True)
        swapped += [_differences(first, second, combine) for first, second in pairs]
    tests = {}
    for name, value in seen.items():
        # Sums in another order round otherwise: what is equal but for that is as extreme.
        limit = abs(value) - 1e-9 * max(1.0, abs(value))
        extreme = sum(abs(other[name]) >= limit for other in swapped)
        p_value = (extreme + 1) / (samples + 1)
        tests[name] = Difference(value, *_bounds([other[name] for other in drawn], level), p_value)
    return tests


def _differences(a: np.ndarray, b: np.ndarray, combine: Combine) -> dict[str, float]:
    first, second = combine(a), combine(b)
    return {name: second[name] - first[name] for name in first}


def _draws(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each row is drawn, (some, rows) at a time: with these, sums over drawn rows are one product."""
    generator = np.random.default_rng(seed)
    for some in _parts(rows, samples):
        indices = generator.integers(rows, size=(some, rows)) + np.arange(some)[:, None] * rows
        yield np.bincount(indices.ravel(), minlength=some * rows).reshape(some, rows).astype(np.float64)


def _swaps(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield which rows are swapped, (some, rows) of 0 and 1 at a time."""
    generator = np.random.default_rng([seed, 1])  # other numbers than the draws'
    for some in _parts(rows, samples):
        yield generator.integers(2, size=(some, rows)).astype(np.float64)


def _parts(rows: int, samples: int) -> Iterator[int]:
    at_once = max(1, NUMBERS_AT_ONCE // rows)
    for start in range(0, samples, at_once):
        yield min(at_once, samples - start)


def _bounds(scores: list[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(statistics: np.ndarray, samples: int, level: float) -> np.ndarray:
    statistics = np.asarray(statistics, dtype=np.float64)
    if statistics.ndim != 2 or not len(statistics):
        raise HfkitError(
            f"statistics: must be of (rows, columns) with at least one row, got the shape {statistics.shape}"
        )
    if samples < 1:
        raise HfkitError(f"samples: must be at least 1, got {samples}; 1000 is usual")
    if not 0 < level < 1:
        raise HfkitError(f"level: must be above 0 and below 1, got {level}; 0.95 is usual")
    return statistics
