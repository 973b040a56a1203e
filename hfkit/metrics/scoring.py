"""What models made of rows, as scores with intervals and tests, and as a file with the scores of each row."""

import dataclasses
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from hfkit.artifacts.manifest import Json, Metrics
from hfkit.metrics.base import Statistics
from hfkit.metrics.catalogue import implementation, load_metric, made_of, named
from hfkit.metrics.labels import confusion
from hfkit.metrics.likelihood import perplexity

Answers = Sequence[str] | Sequence[list[str]]  # of a row its text or class, or the list of its classes
SHOWN_ROWS = 3


def statistics(
    metrics: Sequence[str],
    predictions: Answers,
    references: list[list[str]],
    labels: list[str] | None = None,
    tokenize: str = "auto",
) -> dict[str, Statistics]:
    """Return, of each metric that is made of predictions, its statistics. `bleu` is sacrebleu's, 0 to 100.

    Args:
        predictions: a text or a class a row, or the list of its classes.
        references: of each row what is right; of a list of classes, all of them.
        labels: the classes that F1 is taken over; by default those that are predicted or true.
        tokenize: how words are cut, see `scripts.tokenizer`.
    """
    statistics_of: dict[str, Statistics] = {}
    are_lists = bool(predictions) and isinstance(predictions[0], list)
    expected: Answers = references if are_lists else [row[0] for row in references if row]
    for entry in named(metrics):
        name, options = entry.name, {"tokenize": tokenize} if entry.cuts_words else {}
        if entry.made_of == "texts":
            statistics_of[name] = implementation(entry.implementation).statistics(predictions, references, **options)
        elif name == "accuracy":
            statistics = load_metric(name).statistics(predictions, expected)
            statistics_of[name] = _renamed(statistics, "exact_match") if are_lists else statistics
        elif name == "f1":
            statistics_of[name] = _f1(predictions, expected, labels)
    return statistics_of


def _renamed(statistics: Statistics, name: str) -> Statistics:
    """Return statistics of one score, that goes by another name."""
    (score,) = statistics.scores()
    return dataclasses.replace(
        statistics,
        combine=lambda sums: {name: statistics.combine(sums)[score]},
        signature=f"{name}|{statistics.signature}",
    )


def _f1(predictions: Answers, expected: Answers, labels: list[str] | None) -> Statistics:
    """Return F1 as the mean of classes (`f1` and `f1_macro`), of all hits together, as the mean by frequency, and of
    lists of classes as the mean of rows."""
    averages = ["macro", "micro", "weighted", *(["samples"] if isinstance(predictions[0], list) else [])]
    kinds = {
        average: load_metric("f1").statistics(predictions, expected, labels=labels, average=average)
        for average in averages
    }
    values, of_classes = kinds["macro"].values, kinds["macro"].values.shape[1]
    if "samples" in kinds:
        values = np.concatenate([values, kinds["samples"].values], axis=1)

    def combine(sums: np.ndarray) -> dict[str, float]:
        parts = dict.fromkeys(averages, sums[:of_classes]) | {"samples": sums[of_classes:]}
        values = {f"f1_{average}": kind.combine(parts[average])["f1"] for average, kind in kinds.items()}
        return {"f1": values["f1_macro"], **values}

    counted = classes_in(predictions, expected) if labels is None else labels
    signature = kinds["macro"].signature.replace("average:macro", f"average:{','.join(kinds)}")
    signature = signature.replace(f"labels:{','.join(counted)}|", f"labels:{len(counted)}|")
    return Statistics(values, combine, signature)


def classes_in(*answers: Answers) -> list[str]:
    """Return the classes that rows have or are predicted to have, in the order of their names."""
    return sorted({name for rows in answers for answer in rows for name in listed(answer)})


def listed(answer: str | list[str]) -> list[str]:
    """Return an answer as a list of classes, also where it is one class."""
    return [answer] if isinstance(answer, str) else answer


def of_likelihood(metrics: Collection[str], sums: list[np.ndarray]) -> list[dict[str, Statistics]]:
    """Return `perplexity` and `bits_per_byte`, those that are among the metrics, of one or more models.

    Args:
        sums: of each model the nats, tokens and bytes of each row, (rows, 3). A row that has no room in the window of
            one of them is left out for all.
    """
    names = made_of("likelihood", metrics)
    is_there = np.logical_and.reduce([table[:, 1:2] > 0 for table in sums])

    def combine(total: np.ndarray) -> dict[str, float]:
        return {name: value for name, value in perplexity(total).items() if name in names}

    signature = f"likelihood|rows:{int(is_there.sum())}"
    return [{"likelihood": Statistics(table * is_there, combine, signature)} for table in sums]


def per_class(predictions: Answers, references: list[list[str]]) -> Metrics:
    """Return `f1_per_label`, and `confusion`: how many rows of each class (down) were taken for which (across); of
    lists of classes instead `rows_per_label`: how many rows have each."""
    if isinstance(predictions[0], list):
        labels = classes_in(predictions, references)
        scores_of_labels = load_metric("f1").statistics(predictions, references, labels=labels, average=None).scores()
        rows = {label: sum(label in several for several in references) for label in labels}
        return {"f1_per_label": {label: scores_of_labels[f"f1_{label}"] for label in labels}, "rows_per_label": rows}
    table = confusion([*map(str, predictions)], [row[0] for row in references])
    return {
        "f1_per_label": {label: quality["f1"] for label, quality in table["per_label"].items()},
        "confusion": {"labels": table["labels"], "counts": table["confusion_matrix"]},
    }


def scores(measured: dict[str, Statistics], others: dict[str, Statistics] | None = None) -> dict[str, float]:
    """Return each score with `_low` and `_high`, its 95 % interval; against others of the same rows also
    `_difference`, its interval, and `_p`."""
    results: dict[str, float] = {}
    for name, statistics in measured.items():
        intervals = statistics.intervals()
        differences = statistics.against(others[name]) if others else {}
        for key, value in statistics.scores().items():
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


def row_scores(measured: dict[str, Statistics], rows: int) -> list[dict[str, float]]:
    """Return the scores of every row by itself, where they are made of its answer. Of the kinds of F1 that is the
    same."""
    merged: list[dict[str, float]] = [{} for _ in range(rows)]
    for name, statistics in measured.items():
        if name == "likelihood":
            continue
        for row, values in zip(merged, statistics.row_scores(), strict=True):
            row |= {
                name if key == "score" else key: round(float(value), 6)
                for key, value in values.items()
                if not key.startswith("f1_")
            }
    return merged


def write_predictions(path: Path, rows: list[Json]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def best_worst_random(rows: list[Json], key: str) -> dict[str, list[Json]]:
    """Return three rows of each kind, by one of their scores."""
    order = sorted(rows, key=lambda row: row["scores"][key])
    return {
        "best": order[: -SHOWN_ROWS - 1 : -1],
        "worst": order[:SHOWN_ROWS],
        "random": random.Random(0).sample(rows, min(SHOWN_ROWS, len(rows))),
    }
