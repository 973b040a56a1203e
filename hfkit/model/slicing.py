"""A smaller plain model out of a larger one: some of its layers, and some channels of its widths.

The weights of the result are slices of the larger model's and its configuration says its sizes, so that loading,
generation, adapters and quantization work as with any model. Layers may be dropped from every decoder with one list of
layers; channels only from models with the parameter names and the arithmetic of Llama (`WIDTH_MODELS`).

Which channels are kept is decided by their `Importance`: that of the weights (`weight_importance`), or of activations
on data, as in Minitron (arXiv 2407.14679).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hfkit.errors import HfkitError, reason, refuse

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WIDTH_MODELS = ("hfkit", "llama", "mistral", "qwen2", "qwen3")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # keys of configurations with a value for each layer

# What the rows and the columns of a module's weight stand for; None: all are kept.
STREAM_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": (None, "hidden"),
    "embed_positions": (None, "hidden"),
    "q_proj": ("queries", "hidden"),
    "k_proj": ("keys", "hidden"),
    "v_proj": ("keys", "hidden"),
    "o_proj": ("hidden", "queries"),
    "q_norm": (None,),
    "k_norm": (None,),
    "gate_proj": ("intermediate", "hidden"),
    "up_proj": ("intermediate", "hidden"),
    "down_proj": ("hidden", "intermediate"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "lm_head": (None, "hidden"),
    "score": (None, "hidden"),
}


@dataclass
class Importance:
    """How much each channel of a model counts: those with the highest scores are kept, of equal ones the first.

    Query heads that share a key and value head are a group. It counts as the root of the sum of the squares of those
    of its heads that would be kept.
    """

    hidden: torch.Tensor  # (hidden,)
    intermediate: list[torch.Tensor]  # one a layer, (intermediate,)
    heads: list[torch.Tensor]  # one a layer, (query heads,)


def sliced(
    model: "PreTrainedModel",
    layers: list[int] | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    importance: Importance | None = None,
) -> "PreTrainedModel":
    """Return a new model of the same class with these layers and sizes; what is None stays as it is. `model` is not
    changed.

    Args:
        layers: indices of the layers to keep, ascending.
        num_attention_heads: query heads to keep, equally many of each group. By default all of the kept groups.
        num_key_value_heads: groups of query heads to keep. By default all, but where each query head is a group of its
            own, as many as query heads.
        importance: decides which channels are kept. By default `weight_importance(model)`.

    Raises:
        HfkitError: where `check_slice` finds problems, or the layers differ in more than their weights.
    """
    wanted = dict(zip(WIDTHS, (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads), strict=True))
    refuse(check_slice(model.config, layers, **wanted))
    weights, prefix = model.state_dict(), f"{layers_name(model)}."
    layers = list(range(model.config.num_hidden_layers)) if layers is None else layers
    config = _smaller_config(model.config, layers, _sizes(model.config, wanted))
    attention = model.config._attn_implementation
    smaller = type(model)._from_config(config, dtype=model.dtype, attn_implementation=attention)
    smaller.to(model.device).train(model.training)
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)

    channels, norm_scale = {}, 1.0
    if any(wanted.values()):
        channels = _kept_channels(model.config, config, importance or weight_importance(model))
        # RMSNorm takes its mean over fewer channels now. With this factor the result is, but for epsilon, the model
        # with zeros in the dropped channels; without it, and with a factor measured on data, losses were higher.
        norm_scale = (model.config.hidden_size / config.hidden_size) ** 0.5
    with torch.no_grad():
        for name, target in smaller.state_dict().items():
            layer, source = _source(name, prefix, layers)
            weight = _taken(weights[source], source, channels, layer) if source in weights else target.new_empty(0)
            if weight.shape != target.shape:
                raise HfkitError(
                    f"layers: {layers} cannot stand behind one another, since a layer's kind depends on its place: "
                    f"{source} does not fit in {name}; keep the first layers only"
                )
            target.copy_(weight * norm_scale if name.split(".")[-2] in STREAM_NORMS else weight)
    return smaller


def check_slice(
    config: "PretrainedConfig",
    layers: list[int] | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield what stands against such a slice of a model with this configuration: each key with its problem."""
    wanted = dict(zip(WIDTHS, (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads), strict=True))
    key = next((name for name, value in {"layers": layers, **wanted}.items() if value is not None), "layers")
    if config.is_encoder_decoder or config.sub_configs:
        yield key, f"a model of type {config.model_type} has several parts, and only a decoder alone can be sliced"
        return
    if getattr(config, "quantization_config", None) is not None:  # only quantized models have it
        yield key, "quantized weights cannot be sliced; name the model that was quantized"
        return
    problems = list(_check_layers(config, layers)) + list(_check_widths(config, wanted))
    if not problems:
        try:
            _smaller_config(config, layers or range(config.num_hidden_layers), _sizes(config, wanted))
        except (ValueError, StrictDataclassError) as error:
            problems.append((key, f"a model of type {config.model_type} cannot have these sizes: {reason(error)}"))
    yield from problems


def _check_layers(config: "PretrainedConfig", layers: list[int] | None) -> Iterator[tuple[str, str]]:
    depth = config.num_hidden_layers
    if layers is None:
        return
    if not layers:
        yield "layers", f"[] keeps nothing; name at least one of the layers 0 to {depth - 1}"
    elif outside := [layer for layer in layers if not 0 <= layer < depth]:
        yield "layers", f"{outside[0]} is not a layer of the model, which has the layers 0 to {depth - 1}; correct it"
    elif layers != sorted(set(layers)):
        yield "layers", f"must be ascending, each layer once, got {layers}; write {sorted(set(layers))}"


def _check_widths(config: "PretrainedConfig", wanted: dict[str, int | None]) -> Iterator[tuple[str, str]]:
    widths = {key: value for key, value in wanted.items() if value is not None}
    if widths and config.model_type not in WIDTH_MODELS:
        known = ", ".join(WIDTH_MODELS)
        what = f"a model of type {config.model_type} cannot be made narrower, only {known}"
        yield next(iter(widths)), f"{what}; keep some of its layers instead, with `layers`"
        return
    wrong = {key: value for key, value in widths.items() if not 1 <= value <= getattr(config, key)}
    for key, value in wrong.items():
        yield key, f"must be from 1 to the model's {getattr(config, key)}, got {value}"
    if widths and not wrong:
        sizes = _sizes(config, wanted)
        heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        most = groups * (config.num_attention_heads // config.num_key_value_heads)
        if heads % groups or heads > most:
            rule = f"must be a multiple of the {groups} key and value heads, and at most their {most} query heads"
            yield "num_attention_heads", f"{rule}, got {heads}; change it or num_key_value_heads"
    is_narrower = widths.get("hidden_size", config.hidden_size) != config.hidden_size
    if is_narrower and config.model_type == "hfkit" and config.position_embedding_type == "sinusoidal":
        yield "hidden_size", "sinusoidal positions change with the width, so that no channel can be dropped; delete it"


def _sizes(config: "PretrainedConfig", wanted: dict[str, int | None]) -> dict[str, int]:
    """Return all the widths of the result, the width of a head among them; none if none is to change."""
    widths = {key: value for key, value in wanted.items() if value is not None}
    if not widths:
        return {}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    kept_groups = widths.get("num_attention_heads", groups) if heads == groups else groups
    kept_groups = widths.get("num_key_value_heads", kept_groups)
    kept_heads = kept_groups * (heads // groups)
    sizes = {"num_attention_heads": kept_heads, "num_key_value_heads": kept_groups, "head_dim": _head_dim(config)}
    return {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, **sizes, **widths}


def _head_dim(config: "PretrainedConfig") -> int:
    """Return the width of a head. Not every configuration names it; it must be named once the sizes that it came from
    change."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _smaller_config(config: "PretrainedConfig", layers: Sequence[int], sizes: dict[str, int]) -> "PretrainedConfig":
    """Return the configuration with these layers and sizes, made anew as from its file, so that its own checks see
    it."""
    smaller = copy.deepcopy(config)
    smaller.name_or_path = ""  # by which an adapter would name its base
    smaller.num_hidden_layers = len(layers)
    for key in PER_LAYER:
        if (values := getattr(config, key, None)) is not None:
            setattr(smaller, key, [values[layer] for layer in layers])
    for key, value in sizes.items():
        setattr(smaller, key, value)
    return type(config).from_dict(smaller.to_dict())


def weight_importance(model: "PreTrainedModel") -> Importance:
    """Return the importance of channels by the weights that write and read them, without data.

    - A channel of the MLP: ||gate|| ||up|| ||down||, its rows of the first two and its column of the last.
    - A query head: ||value|| ||output||, the rows of its value head and its columns of o_proj.
    - A channel of the residual stream: ||written|| ||read||. Written: its rows in all o_proj and down_proj, and the
      root of the mean square of its entries in the embeddings, of which a token adds only one. Read: its columns in
      all other matrices, the heads of the model too, each times its weight in the norm before.
    """
    base, groups = model.base_model, model.config.num_key_value_heads
    written, read = torch.zeros(2, model.config.hidden_size, device=model.device)  # sums of squares
    for module in (*base.children(), *model.children()):
        if isinstance(module, nn.Embedding):
            written += _squares(module.weight, 0) / module.num_embeddings
        elif isinstance(module, nn.Linear):
            read += _squares(module.weight * base.norm.weight, 0)
    intermediate, heads = [], []
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        intermediate.append((_squares(gate, 1) * _squares(up, 1) * _squares(down, 0)).sqrt())
        values = _squares(attention.v_proj.weight, 1).view(groups, -1).sum(1)
        outputs = _squares(attention.o_proj.weight, 0).view(model.config.num_attention_heads, -1).sum(1)
        heads.append((values.repeat_interleave(len(outputs) // groups) * outputs).sqrt())
        written += _squares(attention.o_proj.weight, 1) + _squares(down, 1)
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            read += _squares(reader.weight * layer.input_layernorm.weight, 0)
        for reader in (mlp.gate_proj, mlp.up_proj):
            read += _squares(reader.weight * layer.post_attention_layernorm.weight, 0)
    return Importance((written * read).sqrt(), intermediate, heads)


def _squares(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the sum of the squares along an axis, in float32."""
    return weight.detach().float().square().sum(axis)


def _kept_channels(
    config: "PretrainedConfig", smaller: "PretrainedConfig", importance: Importance
) -> dict[str, list[torch.Tensor]]:
    """Return, of each kind of channel, in `AXES` the indices to keep in each layer of the larger model, ascending."""
    head_dim, groups = _head_dim(config), config.num_key_value_heads
    heads_of_group = smaller.num_attention_heads // smaller.num_key_value_heads
    channels: dict[str, list[torch.Tensor]] = {"queries": [], "keys": []}
    for scores in importance.heads:
        by_group = scores.view(groups, -1)  # (groups, heads of a group)
        kept_groups = _highest(by_group.topk(heads_of_group).values.norm(dim=1), smaller.num_key_value_heads)
        kept_heads = torch.cat(
            [group * by_group.shape[1] + _highest(by_group[group], heads_of_group) for group in kept_groups]
        )
        for kind, indices in (("queries", kept_heads), ("keys", kept_groups)):
            channels[kind].append(
                (indices[:, None] * head_dim + torch.arange(head_dim, device=indices.device)).flatten()
            )
    channels["hidden"] = [_highest(importance.hidden, smaller.hidden_size)] * len(importance.heads)
    channels["intermediate"] = [_highest(scores, smaller.intermediate_size) for scores in importance.intermediate]
    return channels


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the highest scores, ascending; of equal scores the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def layers_name(model: "PreTrainedModel") -> str:
    """Return the name of the list of a model's layers, such as `model.layers`.

    Raises:
        HfkitError: if it has not exactly one.
    """
    depth = model.config.num_hidden_layers
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise HfkitError(
            f"layers: the model has {len(outermost)} lists of {depth} layers, and only one can be sliced; use another"
        )
    return outermost[0]


def _source(name: str, prefix: str, layers: list[int]) -> tuple[int, str]:
    """Return where a weight of the smaller model comes from: the layer, 0 if it is in none, and its name there."""
    if not name.startswith(prefix):
        return 0, name
    index, rest = name.removeprefix(prefix).split(".", 1)
    return layers[int(index)], f"{prefix}{layers[int(index)]}.{rest}"


def _taken(weight: torch.Tensor, name: str, channels: dict[str, list[torch.Tensor]], layer: int) -> torch.Tensor:
    """Return the kept rows and columns of a weight; a bias has rows alone."""
    if channels:
        for axis, kind in enumerate(AXES[name.split(".")[-2]][: weight.dim()]):
            if kind is not None:
                weight = weight.index_select(axis, channels[kind][layer].to(weight.device))
    return weight
