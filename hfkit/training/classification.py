"""The trainer of classifiers: evaluation by counts of right and wrong."""

import math
from typing import Any

import torch
from torch.nn import functional

from hfkit.data.rows.examples import Examples
from hfkit.inference import classes
from hfkit.metrics import scoring
from hfkit.metrics.base import Statistics
from hfkit.metrics.catalogue import load_metric
from hfkit.training.compilation import uncompiled
from hfkit.training.evaluation import Batch, over_rows
from hfkit.training.progress import own_random_numbers
from hfkit.training.resumable import ResumableTrainer


def class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Return cross-entropy: the sum over the labels divided by those of the whole step. Many models divide by their
    own batch, and would make a step of several batches too large. Where each class is true or not, (batch, classes) of
    0 and 1, it is binary cross-entropy, and each of these is a label."""
    total = _losses(outputs.logits.float(), labels).sum()
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return nats, (batch,), or (batch, classes) where each class is true or not."""
    if labels.is_floating_point():
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return functional.cross_entropy(logits, labels, reduction="none")


class ClassificationTrainer(ResumableTrainer):
    """Trainer of a model with a head of classes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_loss_func=class_loss, **kwargs)

    def evaluate(
        self,
        eval_dataset: Examples | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return `<prefix>_loss` in nats a label, `<prefix>_accuracy` and `<prefix>_f1` (macro), over all examples;
        after training these with `_low` and `_high`, their 95 % intervals. Of several classes an example, instead of
        the accuracy `<prefix>_exact_match`, and F1 also as `_f1_macro`, `_f1_micro`, `_f1_weighted` and
        `_f1_samples`."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        losses, logits, labels = self._predict(examples, f"evaluating {metric_key_prefix}")
        loss = losses.double().mean().item()
        metrics = {f"{metric_key_prefix}_loss": loss if math.isfinite(loss) else math.inf}
        for statistics in self._statistics(logits, labels).values():
            bounds = statistics.intervals() if metric_key_prefix != "eval" else {}
            for score, value in statistics.scores().items():
                metrics[f"{metric_key_prefix}_{score}"] = float(value)
                if score in bounds:
                    low, high = map(float, bounds[score])
                    metrics |= {f"{metric_key_prefix}_{score}_low": low, f"{metric_key_prefix}_{score}_high": high}
        if metric_key_prefix == "eval":
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def choose_thresholds(self) -> None:
        """Choose on the validation split from which probability on a class is predicted, and keep that in the
        configuration of the model."""
        _, logits, labels = self._predict(self.eval_dataset, "choosing thresholds")
        config: Any = self.accelerator.unwrap_model(self.model).config
        config.thresholds = classes.best_thresholds(logits.sigmoid().numpy(), labels.bool().numpy())

    def _statistics(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Statistics]:
        """Return accuracy and F1 of rows; of several classes a row by their names, and of one by its number."""
        config: Any = self.accelerator.unwrap_model(self.model).config
        if labels.dim() == 1:
            predictions, expected = logits.argmax(-1).tolist(), labels.tolist()
            metrics = {"accuracy": {}, "f1": {"average": "macro"}}
            return {
                name: load_metric(name).statistics(predictions, expected, **kind) for name, kind in metrics.items()
            }
        names = list(config.id2label.values())
        expected = [[names[index] for index, is_so in enumerate(row) if is_so] for row in labels.tolist()]
        return scoring.statistics(("accuracy", "f1"), classes.chosen(logits, config), expected, names)

    def _predict(self, examples: Examples, title: str) -> list[torch.Tensor]:
        """Return nats, logits (rows, classes) and labels of all rows, over all processes."""

        def of_batch(model: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            return _losses(logits, labels), logits, labels

        with self.pause(), uncompiled(), own_random_numbers(self.args.device):
            return over_rows(self, examples, title, of_batch)
