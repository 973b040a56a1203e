"""Metrics of classes: accuracy, F1 and the confusion matrix, with the values of scikit-learn.

A row has one class, or a list of any number of them (multi-label).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from hfkit.artifacts.manifest import Json
from hfkit.errors import HfkitError, did_you_mean, shown
from hfkit.metrics.base import RowMetric, Statistics, check_counts, listed

Label = int | str
AVERAGES = ("binary", "micro", "macro", "weighted", "samples")
NUMBERS = Features({"predictions": Value("int64"), "references": Value("int64")})
NAMES = Features({"predictions": Value("string"), "references": Value("string")})
LISTS = Features({"predictions": ListOf(Value("string")), "references": ListOf(Value("string"))})


class LabelMetric(RowMetric):
    """A metric of predicted and true classes: one a row, all by name or all by number, or a list of names a row."""

    row_features = [NUMBERS, NAMES, LISTS]

    def _checked(self, predictions: Any, references: Any) -> tuple[list[Any], list[Any]]:
        predictions, references = labels_of("predictions", predictions), labels_of("references", references)
        check_counts(predictions, references)
        if predictions and type(predictions[0]) is not type(references[0]):
            raise HfkitError(
                f"predictions and references: must both be names, both be numbers or both be lists of names, got "
                f"{shown(predictions[0])} and {shown(references[0])}"
            )
        return predictions, references


def labels_of(name: str, values: object) -> list[Any]:
    """Return classes as texts or as whole numbers, or as lists of texts, whatever array they come in.

    Raises:
        HfkitError: a value is none of these, or they are mixed.
    """
    labels: list[Any] = []
    for row, value in enumerate(listed(name, values), 1):
        value = value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value
        if np.ndim(value) == 1 and not isinstance(value, str):
            value = _names(name, row, value)
        elif not isinstance(value, (int, str)):
            raise HfkitError(f"{name}: row {row} must be a class, by name or by number, got {shown(value)}")
        labels.append(int(value) if isinstance(value, bool) else value)
        if type(labels[-1]) is not type(labels[0]):
            raise HfkitError(f"{name}: row {row} must be a {_kind(labels[0])} as the rows before, got {shown(value)}")
    return labels


def _names(name: str, row: int, value: Iterable[object]) -> list[str]:
    """Return the classes of a row, each once and in one order."""
    for label in value:
        if not isinstance(label, str):
            raise HfkitError(f"{name}: row {row}: a list of classes must be of their names, got {shown(label)}")
    return sorted({str(label) for label in value})


def _kind(label: object) -> str:
    return "name" if isinstance(label, str) else "list of names" if isinstance(label, list) else "number"


def _set_of(classes: object) -> set[Any]:
    return set(classes) if isinstance(classes, list) else {classes}


def _weights(sample_weight: Sequence[float] | None, rows: int) -> np.ndarray:
    if sample_weight is None:
        return np.ones(rows)
    if len(sample_weight) != rows:
        raise HfkitError(f"sample_weight: {len(sample_weight)} weights for {rows} rows; give each row one")
    return np.asarray(sample_weight, dtype=np.float64)


class Accuracy(LabelMetric):
    """The share of rows of which the class was predicted, 0 to 1, as `evaluate`'s accuracy; of lists of classes the
    share of rows of which exactly the list was."""

    about = "Accuracy: the share of rows whose class was predicted, 0 to 1."

    def _statistics(
        self,
        predictions: list[Any],
        references: list[Any],
        *,
        normalize: bool = True,
        sample_weight: Sequence[float] | None = None,
    ) -> Statistics:
        """Return the weight of each row, and again if its class was predicted.

        Args:
            normalize: whether the score is a share, or else the number of rows.
            sample_weight: how much each row counts.
        """
        weights = _weights(sample_weight, len(predictions))
        hits = np.array([first == second for first, second in zip(predictions, references, strict=True)])

        def combine(sums: np.ndarray) -> dict[str, float]:
            return {"accuracy": float(sums[1] / (sums[0] or 1) if normalize else sums[1])}

        options = {"normalize": normalize, "sample_weight": None if sample_weight is None else "given"}
        return Statistics(
            np.stack([weights, weights * hits], axis=1),
            combine,
            self._signature(options, [None] * len(references), None),  # a list is no choice of references
        )


class F1(LabelMetric):
    """F1, 0 to 1, as `evaluate`'s f1: of one class, of each, or a mean of them.

    A class that resampled rows happen not to have is left out of their macro mean, as scikit-learn would do.
    """

    about = "F1: the harmonic mean of precision and recall of classes, 0 to 1."

    def _statistics(
        self,
        predictions: list[Any],
        references: list[Any],
        *,
        labels: Sequence[Label] | None = None,
        pos_label: Label = 1,
        average: str | None = "binary",
        sample_weight: Sequence[float] | None = None,
    ) -> Statistics:
        """Return, of each row, its class, then the predicted one, then the class again if predicted: (rows, 3 *
        labels).

        Args:
            labels: the classes that count. By default all that are predicted or true, so that two systems are only
                compared class by class if they are given.
            pos_label: the class whose F1 it is with `binary`.
            average: `binary`; `micro`, of all classes' hits together; `macro`, the mean of classes; `weighted`, the
                mean by how many rows have the class; of lists of classes also `samples`, the mean of rows, where one
                without any counts 0; or None, a value each class: scores `f1_<class>`.
            sample_weight: how much each row counts.
        """
        if average is not None and average not in AVERAGES:
            raise HfkitError(f'average: "{average}" is not known, {did_you_mean(str(average), AVERAGES)}')
        are_lists = isinstance(references[0], list)
        if (average == "samples") != are_lists and average in ("samples", "binary"):
            several = "a list of classes" if average == "samples" else "one class"
            allowed = "macro, micro, weighted or None" if average == "samples" else "macro, micro, samples or weighted"
            raise HfkitError(f'average: "{average}" takes {several} a row; use {allowed}')
        predictions, references = ([_set_of(value) for value in rows] for rows in (predictions, references))
        seen = sorted(set[Any]().union(*predictions, *references))
        counted = [pos_label] if average == "binary" else list(seen if labels is None else labels)
        if average == "binary":
            _check_binary(seen, pos_label)
        column_of = {label: number for number, label in enumerate(counted)}
        weights = _weights(sample_weight, len(predictions))
        values = np.zeros((len(predictions), 3, len(counted)))
        for row, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
            for column, classes in enumerate((true, predicted, true & predicted)):
                values[row, column, [column_of[label] for label in classes if label in column_of]] = weights[row]
        options = {"labels": counted, "average": average, "sample_weight": None if sample_weight is None else "given"}
        signature = self._signature(options, references, None)
        if average == "samples":
            return Statistics(
                _of_rows(values, weights), lambda sums: {"f1": float(sums[1] / (sums[0] or 1))}, signature
            )
        array = values.reshape(len(predictions), -1)
        # A class that was asked for and no row has counts as 0 in all resamples and for all systems.
        true_labels = set[Any]().union(*references)
        never = np.array([labels is not None and label not in true_labels for label in counted])

        def scores(sums: np.ndarray) -> np.ndarray:
            return _f1(sums.reshape(3, -1), average, never)

        def combine(sums: np.ndarray) -> dict[str, float]:
            values = scores(sums)
            if average is None:
                return {f"f1_{label}": float(score) for label, score in zip(counted, values, strict=True)}
            return {"f1": float(values)}

        return Statistics(
            array,
            combine,
            signature,
            (lambda: {"f1": scores(array.sum(axis=0))}) if average is None else None,
        )


def _check_binary(seen: list[Any], pos_label: Label) -> None:
    if len(seen) > 2:
        raise HfkitError(f'average: "binary" takes two classes, got {len(seen)}; use macro, micro, weighted or None')
    if len(seen) == 2 and pos_label not in seen:
        raise HfkitError(f"pos_label: {shown(pos_label)} is no class of the rows; use {seen[0]!r} or {seen[1]!r}")


def _of_rows(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weight of each row and its F1 times that, (rows, 2), of (rows, 3, labels) as for `_f1`."""
    true, predicted, hits = (values[:, column].sum(axis=-1) for column in range(3))
    f1 = np.divide(2 * hits, true + predicted, out=np.zeros_like(hits), where=true + predicted > 0)
    return np.stack([weights, weights * f1], axis=1)


def _f1(sums: np.ndarray, average: str | None, never: np.ndarray) -> np.ndarray:
    """Return F1 of (3, labels): rows with the class, rows predicted to have it, and hits. Without any of these it is
    0."""
    true, predicted, hits = sums.sum(axis=1, keepdims=True) if average == "micro" else sums
    f1 = np.divide(2 * hits, true + predicted, out=np.zeros_like(hits), where=true + predicted > 0)
    if average is None:
        return f1
    if average == "weighted":
        return np.asarray((f1 * true).sum() / (true.sum() or 1))
    if average == "macro":
        f1 = f1[never | (true + predicted > 0)]
    return np.asarray(f1.mean() if f1.size else 0.0)


def confusion(
    predictions: Sequence[Label], references: Sequence[Label], labels: Sequence[Label] | None = None
) -> Json:
    """Return which classes are taken for which, and how good each is; the values of scikit-learn.

    Args:
        predictions: a class a row.
        references: its true class.
        labels: the classes in the order of the matrix; by default all there are, sorted.

    Returns:
        `labels`; `confusion_matrix`, rows that have a class (down) and are predicted another (across); and
        `per_label`, of each class its `precision`, `recall`, `f1` (0 to 1) and `support`, the rows that have it.

    Raises:
        HfkitError: there are not as many of one as of the other, no rows, or labels of two kinds.
    """
    predictions, references = Accuracy()._checked(predictions, references)
    if not predictions:
        raise HfkitError("predictions: no rows to score; give at least one prediction")
    order = sorted({*predictions, *references}) if labels is None else list(labels)
    if not {*order} & {*references}:
        raise HfkitError(f"labels: no row has one of {shown(order)}; give the classes that the references have")
    pairs = Counter(zip(references, predictions, strict=True))
    true, predicted = Counter(references), Counter(predictions)
    per_label = {
        label: {
            "precision": pairs[label, label] / (predicted[label] or 1),
            "recall": pairs[label, label] / (true[label] or 1),
            "f1": 2 * pairs[label, label] / ((true[label] + predicted[label]) or 1),
            "support": true[label],
        }
        for label in order
    }
    return {
        "labels": order,
        "confusion_matrix": [[pairs[label, other] for other in order] for label in order],
        "per_label": per_label,
    }
