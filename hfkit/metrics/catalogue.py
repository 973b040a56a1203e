"""Every metric, an entry each, from which all other lists of metrics and scores derive. Imports nothing heavy.

from hfkit import load_metric

load_metric("rouge").compute(predictions=["a cat sat"], references=["the cat sat"])
"""

import importlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hfkit.errors import HfkitError, did_you_mean

if TYPE_CHECKING:
    from hfkit.metrics.base import RowMetric


class Metric(NamedTuple):
    """What hfkit knows of a metric.

    Args:
        name: in recipes.
        made_of: `texts` beside references, `classes`, or the `likelihood` of texts; a task has it if this is among
            what it is measured by.
        scores: the names that its results have.
        implementation: module and class in `hfkit.metrics`; of a likelihood none, whose sums give it.
        multi_label: its scores where a row has a list of classes.
        in_training: those that a fine-tuning also measures of the texts that its model writes.
        on_hub: of the scores that a model's index on the Hub shows, the type that the Hub has for them.
        quality: the score that stands for a model's quality, and its rank among these, the first being preferred.
        lower_is_better: whether of that score less is more.
        needs_overlap: whether a row with a blank reference cannot be scored.
        cuts_words: whether `tokenize` is for it.
    """

    name: str
    made_of: Literal["texts", "classes", "likelihood"]
    scores: tuple[str, ...]
    implementation: str = ""
    multi_label: tuple[str, ...] = ()
    in_training: tuple[str, ...] = ()
    on_hub: dict[str, str] = {}
    quality: tuple[int, str] | None = None
    lower_is_better: bool = False
    needs_overlap: bool = False
    cuts_words: bool = False


CATALOGUE = (
    Metric(
        "accuracy",
        "classes",
        ("accuracy",),
        "labels:Accuracy",
        multi_label=("exact_match",),
        on_hub={"accuracy": "accuracy"},
        quality=(1, "accuracy"),
    ),
    Metric(
        "f1",
        "classes",
        ("f1", "f1_macro", "f1_micro", "f1_weighted"),
        "labels:F1",
        multi_label=("f1", "f1_macro", "f1_micro", "f1_weighted", "f1_samples"),
        on_hub={"f1": "f1", "f1_micro": "f1", "f1_samples": "f1"},
        quality=(2, "f1"),
    ),
    Metric(
        "rouge",
        "texts",
        ("rouge1", "rouge2", "rougeL", "rougeLsum"),
        "rouge:Rouge",
        in_training=("rouge1", "rouge2", "rougeL"),
        on_hub={"rouge1": "rouge", "rouge2": "rouge", "rougeL": "rouge"},
        quality=(3, "rougeL"),
        needs_overlap=True,
        cuts_words=True,
    ),
    Metric(
        "bleu",  # sacrebleu's, 0 to 100; that of `evaluate`, 0 to 1, is in OF_PYTHON
        "texts",
        ("bleu",),
        "bleu:Sacrebleu",
        in_training=("bleu",),
        on_hub={"bleu": "bleu"},
        quality=(5, "bleu"),
        needs_overlap=True,
        cuts_words=True,
    ),
    Metric(
        "chrf",
        "texts",
        ("chrf",),
        "bleu:Chrf",
        on_hub={"chrf": "chrf"},
        quality=(4, "chrf"),
        needs_overlap=True,
    ),
    Metric(
        "exact_match",
        "texts",
        ("exact_match",),
        "text:ExactMatch",
        in_training=("exact_match",),
        on_hub={"exact_match": "exact_match"},
        quality=(6, "exact_match"),
    ),
    Metric(
        "bits_per_byte",
        "likelihood",
        ("bits_per_byte",),
        on_hub={"bits_per_byte": "bits_per_byte"},
        quality=(7, "bits_per_byte"),
        lower_is_better=True,
    ),
    Metric(
        "perplexity",
        "likelihood",
        ("perplexity",),
        on_hub={"perplexity": "perplexity"},
        quality=(8, "perplexity"),
        lower_is_better=True,
    ),
    Metric("length", "texts", ("length",), "text:Length", cuts_words=True),
    Metric("distinct", "texts", ("distinct_1", "distinct_2"), "text:Distinct", cuts_words=True),
)
# What `load_metric` gives: what recipes name, but for `bleu`, which is that of `evaluate`.
OF_PYTHON = {entry.name: entry.implementation for entry in CATALOGUE if entry.implementation} | {
    "bleu": "bleu:Bleu",
    "sacrebleu": "bleu:Sacrebleu",
}


def load_metric(name: str, **settings: Any) -> "RowMetric":
    """Return a metric by its name, as `evaluate.load` but with no network.

    Args:
        name: one of `OF_PYTHON`.
        settings: of `evaluate.Metric`, such as `num_process` and `process_id`.

    Raises:
        HfkitError: no metric has that name.
    """
    if name not in OF_PYTHON:
        raise HfkitError(f'metrics: "{name}" is not known, {did_you_mean(str(name), OF_PYTHON)}')
    return implementation(OF_PYTHON[name], **settings)


def implementation(target: str, **settings: Any) -> "RowMetric":
    """Return the metric `module:Class` of this package, imported when asked for: `evaluate` alone takes seconds."""
    module, _, kind = target.partition(":")
    return getattr(importlib.import_module(f"hfkit.metrics.{module}"), kind)(**settings)


# ---- lists that derive


def named(names: Collection[str]) -> list[Metric]:
    """Return the entries of some metrics, in the order of the names."""
    by_name = {entry.name: entry for entry in CATALOGUE}
    return [by_name[name] for name in names]


def fitting(kinds: Collection[str]) -> list[str]:
    """Return the names of the metrics that fit a task, which is measured by these kinds."""
    return [entry.name for entry in CATALOGUE if entry.made_of in kinds]


def made_of(kind: str, names: Collection[str]) -> list[str]:
    """Return, of some metrics, those that are made of `texts`, `classes` or `likelihood`."""
    return [entry.name for entry in named(names) if entry.made_of == kind]


def score_names(names: Collection[str], is_multi_label: bool | None = False) -> list[str]:
    """Return the names of the scores that some metrics give.

    Args:
        is_multi_label: whether rows have lists of classes; None where that is not known yet.
    """
    scores: list[str] = []
    for entry in named(names):
        scores += entry.scores if not is_multi_label or not entry.multi_label else ()
        scores += entry.multi_label if is_multi_label is not False else ()
    return list(dict.fromkeys(scores))


def scores_of_training(kinds: Collection[str], is_multi_label: bool | None = False) -> list[str]:
    """Return what a training measures on its test split.

    Args:
        kinds: those that its task is measured by.
        is_multi_label: as for `score_names`.
    """
    if "classes" in kinds:
        single = ["accuracy", "f1"] if not is_multi_label else []
        several = score_names(fitting(kinds), True) if is_multi_label is not False else []
        return ["loss", *dict.fromkeys([*single, *several])]
    likelihood = made_of("likelihood", fitting(kinds))
    return ["loss", *likelihood, *(of_answers() if "texts" in kinds else ())]


def of_answers() -> list[str]:
    """Return the scores of the texts that a model writes during its training."""
    return [score for entry in CATALOGUE for score in entry.in_training]


def on_hub() -> dict[str, str]:
    """Return the scores that stand in a model's index, and the Hub's names for what they are."""
    return {score: name for entry in CATALOGUE for score, name in entry.on_hub.items()}


def qualities() -> list[str]:
    """Return which score stands for a model's quality: the first of these that was taken."""
    return [score for _, score in sorted(entry.quality for entry in CATALOGUE if entry.quality is not None)]


def is_lower_better(score: str) -> bool:
    return any(score in entry.scores for entry in CATALOGUE if entry.lower_is_better)
