"""What a model's answers are worth: metrics with intervals and paired tests, with no network.

from hfkit.evaluation import load_metric

load_metric("rouge").compute(predictions=["a cat sat"], references=["the cat sat"])
"""

import importlib
from typing import TYPE_CHECKING, Any

from hfkit.errors import HfkitError, did_you_mean

if TYPE_CHECKING:
    from hfkit.evaluation.base import RowMetric

# Imported when asked for: `evaluate` alone takes seconds.
METRICS = {
    "accuracy": "label_metrics:Accuracy",
    "bleu": "bleu:Bleu",
    "chrf": "bleu:Chrf",
    "distinct": "text_metrics:Distinct",
    "exact_match": "text_metrics:ExactMatch",
    "f1": "label_metrics:F1",
    "length": "text_metrics:Length",
    "rouge": "rouge:Rouge",
    "sacrebleu": "bleu:Sacrebleu",
}


def load_metric(name: str, **settings: Any) -> "RowMetric":
    """A metric by its name, as `evaluate.load` but with no network.

    Args:
        name: one of METRICS.
        settings: of `evaluate.Metric`, such as `num_process` and `process_id`.

    Raises:
        HfkitError: no metric has that name.
    """
    if name not in METRICS:
        raise HfkitError(f'metrics: "{name}" is not known, {did_you_mean(str(name), METRICS)}')
    module, _, kind = METRICS[name].partition(":")
    return getattr(importlib.import_module(f"hfkit.evaluation.{module}"), kind)(**settings)
