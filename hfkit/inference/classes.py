"""From logits to classes: the likeliest one, or (multi-label) all whose probability reaches their threshold."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

MULTI_LABEL = "multi_label_classification"  # `problem_type` of a configuration
THRESHOLD = 0.5  # where none was chosen
ENOUGH_ROWS = 10  # that have a class, for a threshold of its own


def is_multi_label(config: "PretrainedConfig") -> bool:
    return getattr(config, "problem_type", None) == MULTI_LABEL


def chosen(logits: "torch.Tensor", config: "PretrainedConfig") -> list[str] | list[list[str]]:
    """The name of the likeliest class of each row, or the names of all that reach their threshold.

    Args:
        logits: (rows, classes).
        config: with `id2label`, `problem_type` and, of several classes a row, `thresholds` on their probabilities.
    """
    if not is_multi_label(config):
        return [config.id2label[index] for index in logits.argmax(-1).tolist()]
    thresholds = logits.new_tensor(getattr(config, "thresholds", None) or [THRESHOLD] * logits.shape[-1])
    reached = (logits.sigmoid() >= thresholds).tolist()
    return [[config.id2label[index] for index, is_so in enumerate(row) if is_so] for row in reached]


def best_thresholds(probabilities: np.ndarray, has_class: np.ndarray) -> list[float]:
    """Of each class the probability from which on it is chosen, so that its F1 is best on these rows.

    A class that fewer than `ENOUGH_ROWS` rows have takes the one threshold that is best for the F1 of all classes
    together (micro): its own would fit chance.

    Args:
        probabilities: (rows, classes).
        has_class: (rows, classes), bool.
    """
    common = _best(probabilities.ravel(), has_class.ravel())
    columns = zip(probabilities.T, has_class.T, strict=True)
    return [_best(each, true) if true.sum() >= ENOUGH_ROWS else common for each, true in columns]


def _best(probabilities: np.ndarray, is_true: np.ndarray) -> float:
    """The threshold with the best F1, halfway between two probabilities; of equal ones the nearest to a half."""
    order = np.argsort(-probabilities, kind="stable")
    found, hits = probabilities[order].astype(np.float64), np.cumsum(is_true[order])
    if not len(found) or not hits[-1]:
        return THRESHOLD
    scores = 2 * hits / (np.arange(1, len(found) + 1) + hits[-1])
    thresholds = (found + np.append(found[1:], 0.0)) / 2
    is_cut = found != np.append(found[1:], -1.0)  # between equal probabilities there is no threshold
    best = is_cut & (scores >= scores[is_cut].max() - 1e-12)
    return float(min(thresholds[best], key=lambda each: abs(each - THRESHOLD)))
