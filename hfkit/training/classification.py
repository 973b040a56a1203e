"""The trainer of classifiers: evaluation by counts of right and wrong."""

import math
from typing import Any

import torch
from torch.nn import functional

from hfkit.bars import Bar
from hfkit.data.examples import Examples
from hfkit.evaluation import load_metric
from hfkit.training.compilation import uncompiled
from hfkit.training.progress import own_random_numbers
from hfkit.training.resumable import ResumableTrainer, StoppedInEvaluation


def class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy: the sum over the rows divided by those of the whole step. Many models divide by their own batch,
    and would make a step of several batches too large."""
    total = functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


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
        """`<prefix>_loss` in nats an example, `<prefix>_accuracy` and `<prefix>_f1` (macro), over all examples; after
        training these with `_low` and `_high`, their 95 % intervals."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.pause(), uncompiled(), own_random_numbers(self.args.device):
            nats, predicted, expected = self._predict(examples, f"evaluating {metric_key_prefix}")
        metrics = {f"{metric_key_prefix}_loss": nats / len(expected)}
        for name, options in (("accuracy", {}), ("f1", {"average": "macro"})):
            found = load_metric(name).statistics(predicted, expected, **options)
            metrics[f"{metric_key_prefix}_{name}"] = float(found.scores()[name])
            if metric_key_prefix != "eval":
                low, high = map(float, found.intervals()[name])
                metrics |= {f"{metric_key_prefix}_{name}_low": low, f"{metric_key_prefix}_{name}_high": high}
        if metric_key_prefix == "eval":
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _predict(self, examples: Examples, title: str) -> tuple[float, list[int], list[int]]:
        """The sum of the losses in nats, the predicted and the expected classes, over all processes."""
        # Not the compiled model: a second graph would cost more time than it saves. A sharded one runs wrapped only.
        model: Any = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        was_training = model.training
        model.eval()
        nats, predicted, expected = 0.0, list[int](), list[int]()
        for batch in Bar(self.get_eval_dataloader(examples), title):
            if self.is_in_train and self._agree_to_stop():
                raise StoppedInEvaluation
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            losses = functional.cross_entropy(logits, labels, reduction="none")
            # This drops the examples that were repeated to fill the last batch of all processes.
            losses, found, labels = self.accelerator.gather_for_metrics((losses, logits.argmax(-1), labels))
            nats += losses.double().sum().item()
            predicted += found.tolist()
            expected += labels.tolist()
        model.train(was_training)
        return nats if math.isfinite(nats) else math.inf, predicted, expected
