"""The limits that a result must keep to be called finished: `accept:` of a recipe. It imports nothing heavy."""

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from hfkit.artifacts.manifest import Json, Metrics
from hfkit.errors import did_you_mean
from hfkit.recipe.fields import Arguments

_FORM = re.compile(r"(<=|>=)\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(x\s*base)?")
# What a measured model costs, beside what it is worth.
COSTS = (
    "parameters",
    "size_bytes",
    "memory_bytes",
    "load_seconds",
    "first_token_seconds",
    "tokens_per_second",
    "tokens_per_second_batch_8",
)


def check_best(train: Arguments | None, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the metric that chooses the best checkpoint, which Trainer tells after an evaluation.

    Args:
        known: what the training measures.
    """
    name = (train or {}).get("metric_for_best_model")
    if isinstance(name, str) and name.removeprefix("eval_") not in known:
        hint = did_you_mean(name.removeprefix("eval_"), known)
        yield "train.metric_for_best_model", f"is not a score of this training, {hint}"


class Limit(NamedTuple):
    """`<= 1.02x base`: whether it bounds from above, the number, and whether that is a factor of the base's value."""

    is_upper: bool
    number: float
    is_factor: bool


def limit_of(text: str) -> Limit:
    """
    Raises:
        ValueError: if the text is no limit.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'must be like "<= 1.02x base" or ">= 0.4", got {text!r}')
    return Limit(match[1] == "<=", float(match[2]), match[3] is not None)


def _checked(text: str) -> str:
    limit_of(text)
    return text


Accept = Annotated[
    dict[str, Annotated[str, AfterValidator(_checked)]],
    Field(
        description='Limits by metric, such as {bits_per_byte: "<= 1.02x base", size_bytes: "<= 0.3x base"}. A result '
        "that misses one is kept, but not called finished: exit code 3."
    ),
]


def problems(
    limits: dict[str, str], measured: Collection[str], of_base: Collection[str], base: str
) -> Iterator[tuple[str, str]]:
    """Yield limits on what is not measured, as problems of the recipe's keys.

    Args:
        measured: what is known of the result.
        of_base: what is known of its base.
        base: what that is, in words.
    """
    for metric, text in limits.items():
        if metric not in measured:
            yield f"accept.{metric}", f"is not measured here, {did_you_mean(metric, measured)}"
        elif limit_of(text).is_factor and metric not in of_base:
            yield f"accept.{metric}", f"{text}: of {base} it is not measured; give a number without `x base`"


def judged(limits: dict[str, str], result: Metrics, base: Metrics, name: str = "") -> list[Json]:
    """Return each limit beside the value: `name`, `metric`, `limit`, `allowed` (the limit as a number), `value`,
    `base` and whether it is `kept`, which needs a value.

    Args:
        name: of the result, where there are several.
    """
    rows = []
    for metric, text in limits.items():
        limit, value, of_base = limit_of(text), result.get(metric), base.get(metric)
        allowed = limit.number if not limit.is_factor else None if of_base is None else limit.number * of_base
        row: dict[str, Any] = {
            "name": name,
            "metric": metric,
            "limit": text,
            "allowed": allowed,
            "value": value,
            "base": of_base,
        }
        is_known = value is not None and allowed is not None
        row["kept"] = is_known and (value - allowed) * (1 if limit.is_upper else -1) <= 0  # type: ignore[operator]
        rows.append(row)
    return rows


def table(rows: list[Json]) -> list[str]:
    """Return the limits for a person, a line each."""
    cells = [
        [
            " ".join(filter(None, (row["name"], row["metric"]))),
            *(_number(row[key]) for key in ("value", "base")),
            row["limit"] if row["allowed"] is None else f"{row['limit'].split()[0]} {_number(row['allowed'])}",
            "passed" if row["kept"] else "FAILED",
        ]
        for row in rows
    ]
    cells = [["", "value", "base", "limit", ""], *cells]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[at].rjust(widths[at]) for at in (1, 2, 3)), row[4]]).rstrip()
        for row in cells
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
