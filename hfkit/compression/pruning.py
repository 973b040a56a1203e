"""A model with less in it: weights set to zero, or layers and channels taken away."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hfkit.artifacts.manifest import Metrics, is_adapter
from hfkit.compression.calibration import prune_weights, sparsity_of
from hfkit.compression.importance import activation_importance, layers_to_drop
from hfkit.compression.masks import parse_sparsity
from hfkit.compression.settings import WIDTHS, Pruning, Recover
from hfkit.distillation.checks import of_layers
from hfkit.distillation.settings import Loss
from hfkit.model.loading import auto_class_of, load_config
from hfkit.model.matrices import matrices_of, weight_of
from hfkit.model.quantized import empty_model
from hfkit.model.slicing import check_slice, layers_name, sliced
from hfkit.recipe.fields import Arguments

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def problems_with(
    path: str,
    pruning: Pruning,
    recover: Recover | None,
    sequence_length: int,
    has_classes: bool,
    trust_remote_code: bool,
) -> Iterator[tuple[str, str]]:
    """Yield why the model at `path` cannot be pruned, from its configuration.

    Args:
        sequence_length: tokens of the rows that the pruning looks at, or that a recovery learns from.

    Raises:
        HfkitError: if there is none that can be read.
    """
    config = load_config(path, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None and not is_adapter(path):
        yield "model", f"{path}: is quantized, and its weights cannot be pruned; name the model that it was made from"
    elif pruning.method == "depth" and pruning.drop_layers >= config.get_text_config().num_hidden_layers:
        depth = config.get_text_config().num_hidden_layers
        rule = f"must be below the model's {depth} layers, got {pruning.drop_layers}"
        yield "pruning.drop_layers", f"{rule}; one at least must stay"
    elif pruning.method == "depth":
        for _, problem in check_slice(config, layers=[0]):
            yield "pruning.method", problem
    elif pruning.method == "width":
        for key, problem in check_slice(config, **_widths(pruning)):
            yield f"pruning.{key}", problem
    elif group := parse_sparsity(pruning.sparsity or 0.0).group:
        yield from _check_groups(str(pruning.sparsity), config, group, has_classes, trust_remote_code)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    makes_rows = pruning.needs_data or recover is not None
    if makes_rows and longest is not None and sequence_length > longest:
        yield "sequence_length", f"must be at most the model's {longest} positions, got {sequence_length}"
    if recover is not None and recover.has_teacher:
        yield from _check_losses(recover.losses, pruning, config.get_text_config())


def _check_losses(losses: list[Loss], pruning: Pruning, teacher: "PretrainedConfig") -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the layers that losses compare, those of the unpruned model among them."""
    student = copy.copy(teacher)
    student.num_hidden_layers = max(teacher.num_hidden_layers - (pruning.drop_layers or 0), 1)
    student.hidden_size = pruning.hidden_size or teacher.hidden_size
    for index, loss in enumerate(losses):
        if loss.spec.compares == "layers":
            for key, problem in of_layers(loss, index, student, teacher):
                yield f"recover.{key}", problem


def _check_groups(
    sparsity: str, config: "PretrainedConfig", group: int, has_classes: bool, trust_remote_code: bool
) -> Iterator[tuple[str, str]]:
    empty = empty_model(config, auto_class_of(config, has_classes), trust_remote_code)
    for name, matrix in matrices_of(empty.get_submodule(layers_name(empty))).items():
        if (inputs := weight_of(matrix).shape[1]) % group:
            rule = f"{sparsity} needs matrices whose inputs are a multiple of {group}"
            yield "pruning.sparsity", f"{rule}, and {name} has {inputs}; use a share such as 0.5"
            return


def prune(model: "PreTrainedModel", pruning: Pruning, rows: torch.Tensor | None) -> tuple[Any, Metrics]:
    """Return the pruned model, and what is to be said of it. With masks it is the same model, changed in place.

    Args:
        rows: tokens that show what the parts of the model do, int64 (rows, length); None for magnitude.

    Returns:
        The model, and `zeros` (the share of the masked matrices' weights) or `kept_layers` or the widths.
    """
    if pruning.is_mask:
        prune_weights(model, rows, pruning.method, parse_sparsity(pruning.sparsity))  # type: ignore[arg-type]
        shares, modules = sparsity_of(model), dict(model.named_modules())
        sizes = {name: modules[name].weight.numel() for name in shares}
        return model, {"zeros": sum(shares[name] * sizes[name] for name in shares) / sum(sizes.values())}
    assert rows is not None, f"{pruning.method} looks at text"
    if pruning.method == "width":
        return sliced(model, **_widths(pruning), importance=activation_importance(model, rows)), _widths(pruning)
    dropped = layers_to_drop(model, rows, pruning.drop_layers or 0, pruning.by or "block_influence")
    layers = [layer for layer in range(model.config.num_hidden_layers) if layer not in dropped]
    return sliced(model, layers=layers), {"kept_layers": layers}


def _widths(pruning: Pruning) -> Arguments:
    return {name: getattr(pruning, name) for name in WIDTHS if getattr(pruning, name) is not None}
