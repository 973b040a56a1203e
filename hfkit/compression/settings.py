"""The recipe keys of quantization and pruning. Nothing heavy is imported: recipes are checked before torch loads."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from hfkit.data.tasks import Task
from hfkit.data.tasks.checks import check_data
from hfkit.distillation.settings import Loss
from hfkit.recipe.fields import RecipePart, ResolvedInput, ResolvedInputs
from hfkit.training.settings import AnyOptimizer, Optimizer

MASKS = ("magnitude", "wanda", "sparsegpt")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
ARGUMENTS: dict[str, tuple[str, ...]] = {  # of each method
    **dict.fromkeys(MASKS, ("sparsity",)),
    "depth": ("drop_layers", "by"),
    "width": WIDTHS,
}


@dataclasses.dataclass
class TorchAo:
    """What `method: torchao` takes."""

    quant_type: str  # the name of a class of torchao.quantization, such as Int8WeightOnlyConfig
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # of that class
    modules_to_not_convert: list[str] | None = None  # beside the head, which always stays whole


class Pruning(RecipePart):
    """What is taken away. Masks (magnitude, wanda, sparsegpt) set weights to zero and leave all sizes as they are;
    depth and width give a plain smaller model."""

    method: Literal["magnitude", "wanda", "sparsegpt", "depth", "width"]
    sparsity: float | str | None = Field(
        None, description='Of masks: the share of zeros in each matrix, such as 0.5, or a pattern such as "2:4".'
    )
    drop_layers: int | None = Field(None, ge=1, description="Of depth: how many layers go.")
    by: Literal["block_influence", "angular_distance"] | None = Field(
        None,
        description="Of depth, which go. block_influence: those that turn the hidden states least. angular_distance: "
        "those behind one another that together turn them least. By default block_influence.",
    )
    hidden_size: int | None = Field(None, ge=1, description="Of width: channels of the residual stream that stay.")
    intermediate_size: int | None = Field(None, ge=1, description="Of width: channels of each MLP that stay.")
    num_attention_heads: int | None = Field(None, ge=1, description="Of width: query heads that stay.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Of width: key and value heads that stay.")

    @model_validator(mode="after")
    def _own_arguments(self) -> "Pruning":
        takes = ARGUMENTS[self.method]
        names = [name for name in type(self).model_fields if name != "method" and getattr(self, name) is not None]
        for name in names:
            if name not in takes:
                raise ValueError(
                    f"{name}={getattr(self, name)}: {self.method} takes {', '.join(takes)}; delete the key"
                )
        if not set(names) - {"by"}:
            raise ValueError(f"method={self.method}: does not say how much to prune; set {' or '.join(takes)}")
        if self.sparsity is not None:
            share = _share(self.sparsity)
            if share is None or not 0 < share < 1:
                rule = 'must be a share above 0 and below 1, or N:M with N from 1 to M - 1, such as "2:4"'
                raise ValueError(f"sparsity={self.sparsity}: {rule}")
        return self

    @property
    def is_mask(self) -> bool:
        return self.method in MASKS

    @property
    def needs_data(self) -> bool:
        return self.method != "magnitude"


def _share(sparsity: float | str) -> float | None:
    """Return the share of zeros; None for what is none."""
    share, _, group = str(sparsity).partition(":")
    try:
        return 1 - int(share) / int(group) if group else float(sparsity)
    except (ValueError, ZeroDivisionError):
        return None


class Recover(RecipePart):
    """A training after the pruning, on the training split of `data`, with masks held. `train:` are its arguments."""

    losses: list[Loss] = Field(
        [Loss(loss="forward_kl")],
        min_length=1,
        description="As in distill, the unpruned model being the teacher. `[{loss: cross_entropy}]` is a fine-tuning.",
    )
    optimizer: AnyOptimizer = Optimizer()
    packing: Literal["documents", "concatenate"] = "documents"

    @property
    def has_teacher(self) -> bool:
        return any(loss.loss != "cross_entropy" for loss in self.losses)


def check_recover(recover: Recover) -> Iterator[tuple[str, str]]:
    """Yield what a list of losses gets wrong."""
    if not sum(loss.weight for loss in recover.losses):
        yield "recover.losses", "the weights sum to 0, so that nothing would be learned; raise one"
    for index, loss in enumerate(recover.losses):
        if loss.loss == "uld":
            yield f"recover.losses.{index}", "uld: the unpruned model has the same tokens; use forward_kl"
        if loss.spec.compares == "layers" and loss.kind == "maps":
            yield f"recover.losses.{index}.kind", "maps are not kept in a recovery; use `kind: relations`"


def check_calibration(
    task: Task, inputs: ResolvedInputs, calibration_split: str, split: str, needed: bool, by: str
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the text that a method looks at.

    Args:
        split: that the result is evaluated on.
        needed: whether it looks at any.
        by: its name.
    """
    calibration = inputs.get("calibration")
    if needed and calibration is None:
        yield "calibration", f"is missing; {by} needs calibration data: name a data set, whose training split is taken"
    if not needed and calibration is not None:
        yield "calibration", f"{by} uses no calibration data; delete the key"
    if not needed or calibration is None:
        return
    if calibration.path == inputs["data"].path and calibration_split == split:
        rule = f"is the {split} split that the result is evaluated on; calibrate on another"
        yield "calibration_split", rule
    for _, problem in check_data(task, ResolvedInput(calibration.path)):
        yield "calibration", problem
