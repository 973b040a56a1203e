"""Predictions to scores with intervals, a file of predictions, and a table for a person."""

import json
import random
from pathlib import Path
from typing import Any

from hfkit.evaluation import load_metric
from hfkit.evaluation.base import Statistics

OF_TEXTS = ("rouge", "bleu", "chrf", "exact_match", "length", "distinct")
OF_CLASSES = ("accuracy", "f1")
OF_LIKELIHOOD = ("perplexity", "bits_per_byte")
SHOWN_ROWS = 3


def statistics(
    metrics: list[str], predictions: list[str], references: list[list[str]], labels: list[str] | None
) -> dict[str, Statistics]:
    """Of each metric that is made of predictions, its statistics. `bleu` is sacrebleu's, 0 to 100."""
    found = {}
    for name in metrics:
        if name in OF_CLASSES:
            options = {"labels": labels, "average": "macro"} if name == "f1" else {}
            found[name] = load_metric(name).statistics(predictions, [each[0] for each in references], **options)
        elif name in OF_TEXTS:
            found[name] = load_metric("sacrebleu" if name == "bleu" else name).statistics(predictions, references)
    return found


def scores(found: dict[str, Statistics], others: dict[str, Statistics] | None = None) -> dict[str, float]:
    """Each score with `_low` and `_high`, its 95 % interval; against others of the same rows also `_difference`, its
    interval, and `_p`."""
    results: dict[str, float] = {}
    for name, each in found.items():
        intervals = each.intervals()
        differences = each.against(others[name]) if others else {}
        for key, value in each.scores().items():
            label = name if key == "score" else key
            results[label] = float(value)
            results[f"{label}_low"], results[f"{label}_high"] = map(float, intervals[key])
            if key in differences:
                results |= {
                    f"{label}_difference": float(differences[key].difference),
                    f"{label}_difference_low": float(differences[key].low),
                    f"{label}_difference_high": float(differences[key].high),
                    f"{label}_p": float(differences[key].p_value),
                }
    return results


def row_scores(found: dict[str, Statistics], rows: int) -> list[dict[str, float]]:
    """The scores of every row by itself."""
    merged: list[dict[str, float]] = [{} for _ in range(rows)]
    for name, each in found.items():
        for row, values in zip(merged, each.row_scores(), strict=True):
            row |= {name if key == "score" else key: round(float(value), 6) for key, value in values.items()}
    return merged


def write_predictions(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def best_worst_random(rows: list[dict[str, Any]], key: str) -> list[tuple[str, dict[str, Any]]]:
    """Three rows of each kind, by one of their scores."""
    order = sorted(rows, key=lambda row: row["scores"][key])
    some = random.Random(0).sample(rows, min(SHOWN_ROWS, len(rows)))
    kinds = (("best", order[: -SHOWN_ROWS - 1 : -1]), ("worst", order[:SHOWN_ROWS]), ("random", some))
    return [(kind, row) for kind, chosen in kinds for row in chosen]


def table(results: dict[str, float]) -> list[str]:
    """A line a score: its value, its interval, and what it has over the other model."""
    lines = []
    for name, value in results.items():
        if f"{name}_low" in results and not name.endswith("_difference"):
            line = f"  {name:<18} {value:10.4g}   95 % {results[f'{name}_low']:.4g} to {results[f'{name}_high']:.4g}"
            if f"{name}_p" in results:
                line += f"   {results[f'{name}_difference']:+.4g} over the other, p = {results[f'{name}_p']:.3g}"
            lines.append(line)
    return lines
