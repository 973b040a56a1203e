"""The recipe keys of a distillation. It imports nothing heavy: recipes are checked before torch is loaded."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hfkit.data.tasks import Task
from hfkit.distillation.catalogue import LOSSES, LossSpec, about_losses
from hfkit.recipe.fields import RecipePart
from hfkit.training.settings import BadSteps, Optimizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]


class Loss(RecipePart):
    """One term of the objective: `weight` times its sum over the learned tokens, divided by their number."""

    loss: LossName = Field(description=about_losses())
    weight: float = Field(1.0, ge=0, description="Factor of this loss in the sum.")
    temperature: float | None = Field(
        None, gt=0, description="Divides all logits; the loss is multiplied by its square. By default 1."
    )
    beta: float | None = Field(
        None, gt=0, lt=1, description="Of jsd: near 0 it is like forward_kl, near 1 like reverse_kl. By default 0.5."
    )
    kind: Literal["mse", "cosine", "relations", "maps"] | None = Field(
        None,
        description="hidden_states: mse (default) or cosine. attention: relations of queries, keys and values "
        "(default), or maps, the attention weights.",
    )
    layers: list[list[int]] | None = Field(
        None,
        min_length=1,
        description="Pairs of layers, the student's and the teacher's, counted from 0. By default hidden_states takes "
        "all of the student's, evenly spread over the teacher's, and attention the last of both.",
    )
    projection: bool | None = Field(
        None, description="Whether hidden states are compared through a learned map. By default where widths differ."
    )
    relation_heads: int | None = Field(
        None, ge=1, description="Heads into which the joined heads of both are split anew. By default a common number."
    )

    @model_validator(mode="after")
    def _own_arguments(self) -> "Loss":
        allowed = self.spec.arguments
        for name in ("temperature", "beta", "kind", "layers", "projection", "relation_heads"):
            if getattr(self, name) is not None and name not in allowed:
                takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none but weight"
                raise ValueError(f"{name}={getattr(self, name)}: {self.loss} has no such argument, {takes}")
        if self.kind is not None and self.kind not in self.spec.kinds:
            raise ValueError(f"kind={self.kind}: of {self.loss} must be {' or '.join(self.spec.kinds)}")
        for pair in self.layers or []:
            if len(pair) != 2 or min(pair) < 0:
                raise ValueError(f"layers={pair}: must be a pair [student's layer, teacher's layer], counted from 0")
        return self

    @property
    def way(self) -> str:
        """Return the kind of the loss, or the default of it."""
        return self.kind or self.spec.kinds[0]

    @property
    def spec(self) -> LossSpec:
        return LOSSES[self.loss]


class Targets(RecipePart):
    """Where the teacher's signal comes from."""

    source: Literal["online", "cached", "generated", "on_policy"] = Field(
        "online",
        description="online: the teacher runs beside the student. cached: it runs once over the data, and its sparse "
        "targets are kept on disk. generated: it writes the completions that the student learns. on_policy: the "
        "student writes completions, and the teacher scores them.",
    )
    method: Literal["sampled", "top_k"] = Field(
        "sampled", description="Of cached targets. sampled: draws from the teacher, unbiased. top_k: the likeliest."
    )
    draws: int = Field(90, ge=1, le=255, description="Of sampled targets: draws for each token.")
    k: int = Field(19, ge=1, description="Of top_k targets: entries for each token.")
    share: float = Field(
        0.5, gt=0, le=1, description="Of on_policy: the share of batches whose completions the student writes."
    )

    @model_validator(mode="after")
    def _own_arguments(self) -> "Targets":
        owners = {"method": "cached", "draws": "cached", "k": "cached", "share": "on_policy"}
        for name in self.model_fields_set - {"source"}:
            if self.source != owners[name]:
                raise ValueError(f"{name}={getattr(self, name)}: belongs to `source: {owners[name]}`; delete one")
        return self


class FromTeacher(RecipePart):
    """A student cut out of its teacher. What is not given stays as the teacher has it."""

    layers: list[int] | None = Field(
        None, min_length=1, description="The teacher's layers that are kept, counted from 0, in ascending order."
    )
    hidden_size: int | None = Field(None, ge=1, description="Channels of the residual stream that are kept.")
    intermediate_size: int | None = Field(None, ge=1, description="Channels of each MLP that are kept.")
    num_attention_heads: int | None = Field(None, ge=1, description="Query heads that are kept.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Key and value heads that are kept.")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a student is, and what it learns from its teacher.

    Attributes:
        student: an id or a folder, the fields of a new model's configuration, or `from_teacher:`.
        train: arguments of `TrainingArguments`.
        sequence_length: tokens in a row.
        packing: of whole documents, see `token_rows`.
        generation: arguments of `GenerationConfig`, for what student and teacher write.
        evaluation_rows: for which texts are generated, of a split.
        cross_tokenizer: "uld" where the two have different tokens.
        teacher_quantization: arguments of `BitsAndBytesConfig`.
        lora: arguments of `LoraConfig`; without them the whole student learns.
    """

    task: Task
    student: str | dict[str, Any]
    train: dict[str, Any]
    losses: list[Loss]
    sequence_length: int
    packing: str
    generation: dict[str, Any]
    optimizer: Optimizer
    bad_steps: BadSteps
    targets: Targets = dataclasses.field(default_factory=Targets)
    evaluation_rows: int = 50
    cross_tokenizer: str | None = None
    teacher_quantization: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False


def check_losses(losses: list[Loss], targets: Targets, cross_tokenizer: str | None) -> Iterator[tuple[str, str]]:
    """Yield what a list of losses gets wrong together, as problems of the recipe's keys."""
    if not sum(loss.weight for loss in losses):
        yield "losses", "the weights sum to 0, so that nothing would be learned; raise one"
    temperatures = set()
    for index, loss in enumerate(losses):
        if loss.spec.compares == "layers" and targets.source in ("cached", "generated"):
            yield f"losses.{index}", f"{loss.loss} needs the teacher's layers; use `targets: {{source: online}}`"
        if loss.spec.compares == "logits" and targets.source == "generated":
            yield f"losses.{index}", f"{loss.loss}: of generated completions only cross_entropy is learned; delete it"
        if targets.source == "cached" and loss.spec.compares == "logits" and not loss.spec.sparse:
            yield (
                f"losses.{index}",
                f"{loss.loss} needs whole distributions, cached targets are sparse; use forward_kl",
            )
        if loss.spec.sparse:
            temperatures.add(loss.temperature or 1.0)
        if loss.spec.is_across_tokenizers != (cross_tokenizer == "uld") and loss.spec.compares == "logits":
            rule = "takes `loss: uld` for the teacher's logits, and only it does; change one of them"
            yield f"losses.{index}", f"{loss.loss}: `cross_tokenizer: uld` {rule}"
        if loss.spec.compares == "layers" and cross_tokenizer is not None:
            yield f"losses.{index}", f"{loss.loss}: layers cannot be compared token by token with `cross_tokenizer`"
    if targets.source == "cached" and len(temperatures) > 1:
        yield "losses", f"cached targets have one temperature, got {', '.join(map(str, sorted(temperatures)))}"
    if targets.source != "generated" and not any(loss.spec.compares != "data" and loss.weight for loss in losses):
        yield "losses", "no loss needs the teacher; add forward_kl, or train with `stage: pretrain` or `finetune`"


def spread(student_layers: int, teacher_layers: int) -> list[list[int]]:
    """Return each layer of the student with one of the teacher's, evenly: the last with the last."""
    return [[index, (index + 1) * teacher_layers // student_layers - 1] for index in range(student_layers)]


def layer_pairs(loss: Loss, student: "PretrainedConfig", teacher: "PretrainedConfig") -> list[list[int]]:
    """Return the pairs of layers that a loss compares.

    Args:
        student, teacher: their configurations.
    """
    layers = student.num_hidden_layers, teacher.num_hidden_layers
    if loss.layers is not None:
        return loss.layers
    return [[layers[0] - 1, layers[1] - 1]] if loss.loss == "attention" else spread(*layers)
