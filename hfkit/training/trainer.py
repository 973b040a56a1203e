"""The trainer of language models: the optimizers, and evaluation by token sums."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

from hfkit.data.rows import learned
from hfkit.data.rows.packing import IGNORED, PackedRows
from hfkit.errors import HfkitError
from hfkit.metrics.intervals import bootstrap
from hfkit.model.heads import causal_of, compute_loss_with, is_plain, portable_attention
from hfkit.recipe.fields import Arguments
from hfkit.training.chunked_head import chunk_tokens, chunked_head
from hfkit.training.compilation import uncompiled
from hfkit.training.evaluation import over_rows
from hfkit.training.optimizers import MuonWithAdamW, kinds_of
from hfkit.training.progress import own_random_numbers
from hfkit.training.resumable import ResumableTrainer
from hfkit.training.settings import Optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CrossEntropy:
    """The loss of plain training, from hidden states: the logits of a few learned tokens exist at a time.

    Attributes:
        places: of the next batch, where its trainer knows them.
    """

    def __init__(self, compiled: bool):
        self.compiled, self.places = compiled, None

    @torch.compiler.disable
    def __call__(self, outputs: Any, head: Any, labels: torch.Tensor, items: torch.Tensor | None) -> torch.Tensor:
        """Return the sum over the learned tokens divided by `items`, those of the whole step; without, the mean."""
        at = learned.places(labels) if self.places is None else self.places
        states, targets = learned.taken(outputs.last_hidden_state, at), labels.flatten()[at + 1]
        chunk = chunk_tokens(head.weight.shape[0], states.device)
        total, _ = chunked_head(
            states, head.weight, head.bias, _of_chunk, lambda rows: (targets[rows],), chunk, self.compiled
        )
        return total / (len(targets) if items is None else items)


def _of_chunk(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return total, total.detach()[None]


class HfkitTrainer(ResumableTrainer):
    """Trainer with the `optimizer` of a recipe, and losses that are sums over tokens divided by their number."""

    def __init__(
        self,
        model: "PreTrainedModel",
        args: TrainingArguments,
        *others: Any,
        optimizer: Optimizer | Literal["adamw", "muon"] = "adamw",
        task_metrics: Callable[[], dict[str, float]] | None = None,
        loss_of: Callable[..., torch.Tensor] | None = None,
        **kwargs: Any,
    ):
        """Set up a training. `task_metrics` are added to those of an evaluation during training, such as ROUGE of
        generated texts. `loss_of` is what the loss is made by, see `hfkit.model.heads`; by default it is the
        cross-entropy."""
        if is_plain(model):
            is_compiled = (kwargs.get("decided") or {}).get("torch_compile", args.torch_compile)
            loss_of = loss_of or CrossEntropy(bool(is_compiled))
            compute_loss_with(model, loss_of)
        elif loss_of is not None:
            kind = causal_of(model).config.model_type
            what = f"a model of type {kind} caps or scales its logits, or its head is not a linear map"
            raise HfkitError(f"losses: {what}, and only its own cross-entropy trains it; fine-tune it")
        super().__init__(model, args, *others, **kwargs)
        self.loss_of, collate = loss_of, self.data_collator  # type: ignore[has-type]
        is_flash = "flash" in (causal_of(model).config._attn_implementation or "")
        self.data_collator = learned.noting(collate, with_bounds=is_flash)
        self.settings = Optimizer(name=optimizer) if isinstance(optimizer, str) else optimizer
        self.task_metrics = task_metrics

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        positions = inputs.pop(learned.LEARNED, None)
        if isinstance(self.loss_of, CrossEntropy):
            self.loss_of.places = positions
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            kinds = kinds_of(model)
            if self.settings.name == "muon":
                self.optimizer = self._muon(model, kinds)
            else:
                self.optimizer = super().create_optimizer(model)
            self._set_rates(self.optimizer, model, kinds)
        return self.optimizer

    def _muon(self, model: nn.Module, kinds: dict[str, str]) -> torch.optim.Optimizer:
        args = self.args
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        matrices = [parameter for name, parameter in sorted(trained.items()) if kinds[name] == "matrix"]
        if self.is_deepspeed_enabled:
            raise HfkitError("optimizer=muon: DeepSpeed flattens the matrices that Muon needs; use adamw or FSDP")
        if not matrices:
            raise HfkitError("optimizer=muon: the model has no hidden matrix to train; use adamw")
        decayed, precision = set(self.get_decay_parameter_names(model)), self.decided.get("muon_precision")
        rest = [name for name in trained if kinds[name] != "matrix"]
        return MuonWithAdamW(
            {"params": matrices, "weight_decay": args.weight_decay},
            [
                {"params": [trained[name] for name in rest if name in decayed], "weight_decay": args.weight_decay},
                {"params": [trained[name] for name in rest if name not in decayed], "weight_decay": 0.0},
            ],
            {"lr": args.learning_rate, "dtype": torch.float32 if precision == "fp32" else torch.bfloat16},
            {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "fused": True,
            },
        )

    def _set_rates(self, optimizer: torch.optim.Optimizer, model: nn.Module, kinds: dict[str, str]) -> None:
        """Move embeddings and head into groups of their own, where they have learning rates of their own."""
        rates = {"embedding": self.settings.embedding_learning_rate, "head": self.settings.head_learning_rate}
        kind_of = {parameter: kinds[name] for name, parameter in model.named_parameters()}
        for group in list(optimizer.param_groups):
            for kind, rate in rates.items():
                moved = [parameter for parameter in group["params"] if kind_of[parameter] == kind]
                if rate is not None and moved:
                    group["params"] = [parameter for parameter in group["params"] if kind_of[parameter] != kind]
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})

    def evaluate(
        self,
        eval_dataset: PackedRows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return loss, perplexity and bits per byte of packed rows, from sums over their tokens.

        Returns:
            `<prefix>_loss` in nats a token, `<prefix>_perplexity`, and `<prefix>_bits_per_byte`: the bits that the
            model needs for the text, its document ends included, divided by the bytes of the text.
        """
        rows: PackedRows = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.pause(), uncompiled(), own_random_numbers(self.args.device):
            scores = self.token_metrics(rows, f"evaluating {metric_key_prefix}", intervals=metric_key_prefix != "eval")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        if metric_key_prefix == "eval":  # in training; what follows it stands in metrics.json
            if self.task_metrics is not None:
                with self.pause(), uncompiled(), own_random_numbers(self.args.device):
                    metrics |= {f"eval_{name}": value for name, value in self.task_metrics().items()}
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def token_metrics(
        self, rows: PackedRows, title: str, model: "PreTrainedModel | None" = None, intervals: bool = True
    ) -> dict[str, float]:
        """Return `loss`, `perplexity` and `bits_per_byte` of rows under a model, by default the one that is trained.

        With `intervals` also their 95 % intervals over the rows of tokens, `loss_low`, `loss_high` and so on; each row
        is taken to have as many bytes a token as the whole.
        """
        # flex_attention that is not compiled would hold the scores of all tokens.
        with portable_attention(self.model if model is None else model):
            sums = self._token_sums(rows, title, model)
        bits_per_byte = float(sums[:, 1].sum()) / math.log(2) / rows.bytes  # of a loss of one nat a token

        def combine(total: np.ndarray) -> dict[str, float]:
            loss = float(total[0] / max(total[1], 1))
            return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss * bits_per_byte}

        metrics = combine(sums.sum(0))
        if intervals and math.isfinite(metrics["loss"]):
            for name, (low, high) in bootstrap(sums, combine).items():
                metrics |= {f"{name}_low": low, f"{name}_high": high}
        return metrics

    def _token_sums(self, rows: PackedRows, title: str, model: "PreTrainedModel | None") -> np.ndarray:
        """Return the sum of the losses in nats and the number of predicted tokens of each row, (rows, 2)."""
        sums, counts = over_rows(self, rows, title, _row_sums, model)
        return torch.stack([sums.double(), counts.double()], dim=1).numpy()


def _row_sums(model: "PreTrainedModel", batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch.pop("labels")[:, 1:]
    batch.pop(learned.LEARNED, None)
    logits = model(**batch, use_cache=False).logits[:, :-1]
    sums = torch.stack([_cross_entropy(*row) for row in zip(logits, labels, strict=True)])
    return sums, (labels != IGNORED).sum(-1)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum over one row: so only one row's logits (sequence, vocabulary) exist in float32."""
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def loading(device: torch.device) -> Arguments:
    """Return the arguments that bring batches to a device: to a GPU from pinned memory, without waiting."""
    is_gpu = device.type != "cpu"
    return {"dataloader_pin_memory": is_gpu, "accelerator_config": {"non_blocking": is_gpu}}


def training_arguments(values: Arguments, output_dir: Path, **defaults: Any) -> TrainingArguments:
    """Return TrainingArguments of a recipe's `train:` section. `defaults` are hfkit's, where the recipe is silent.

    Raises:
        HfkitError: with the library's own words, if it refuses the values together.
    """
    try:
        # Without this Trainer refuses bf16 where there is no GPU, although many CPUs have it.
        own = {"use_cpu": not torch.accelerator.is_available(), **defaults}
        args = TrainingArguments(output_dir=str(output_dir), **{**own, **values})
    except (ValueError, ImportError) as error:
        raise HfkitError(f"train: {error}") from None
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process drives one device; `accelerate launch` starts one for each
    return args
