"""A model's sizes without its memory: parameters, FLOPs, bytes of weights, and what a backward pass keeps."""

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from hfkit.compression.quantization import promised_bytes, scheme_of
from hfkit.model.adapters import adapt
from hfkit.model.flops import training_flops_per_token
from hfkit.model.heads import decoder_of
from hfkit.model.loading import auto_class_of
from hfkit.model.matrices import matrices_of
from hfkit.model.quantized import whole_modules
from hfkit.planning.work import Model
from hfkit.training.compilation import repeated_layers
from hfkit.training.optimizers import kinds_of

KEPT_BY_KERNELS = ("flex_attention", "flash_attention_2")  # which keep what sdpa keeps, and are not everywhere


@dataclasses.dataclass(frozen=True)
class Shape:
    """
    Args:
        parameters, trained: how many.
        matrices: of the trained ones, those that Muon takes.
        weight_bytes: of the model as it is loaded: whole in float32, or quantized.
        largest_layer: parameters of the largest block, which a sharded model gathers.
        layers: how many blocks.
        vocab_size: width of the logits.
        forward_flops, training_flops: for each token of a row of some length.
    """

    parameters: int
    trained: int
    matrices: int
    weight_bytes: float
    largest_layer: int
    layers: int
    vocab_size: int
    forward_flops: float
    training_flops: float


def build(model: Model, attn_implementation: str = "sdpa") -> Any:
    """A model with random weights, on whatever device is the default; with its adapter, but not quantized."""
    config = copy.deepcopy(model.config)
    if model.classes:
        config.num_labels = model.classes
    attention = "sdpa" if attn_implementation in KEPT_BY_KERNELS else attn_implementation
    kind = auto_class_of(config, bool(model.classes))
    made: Any = kind.from_config(config, attn_implementation=attention, dtype=torch.float32)
    if made.config.pad_token_id is None:
        made.config.pad_token_id = 0
    return made if model.lora is None else adapt(made, model.lora, bool(model.classes), is_quantized=False)


def shape_of(model: Model, length: int) -> Shape:
    """The sizes of a model, for rows of `length` tokens."""
    return _shape_of(model.key, length, model)


@functools.lru_cache(maxsize=256)
def _shape_of(key: str, length: int, model: Model) -> Shape:
    with torch.device("meta"):
        made = build(model)
    config = made.config.get_text_config()
    trained, kinds = {name: each for name, each in made.named_parameters() if each.requires_grad}, kinds_of(made)
    blocks = [sum(map(torch.numel, each.parameters())) for each in repeated_layers(made)]
    training = training_flops_per_token(made, length)
    frozen = sum(each.numel() for each in made.parameters() if not each.requires_grad)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 12 * config.num_hidden_layers * width * length
    multiplied = (training - attention - 4 * frozen) / 6 + frozen
    return Shape(
        parameters=sum(map(torch.numel, made.parameters())),
        trained=sum(map(torch.numel, trained.values())),
        matrices=sum(each.numel() for name, each in trained.items() if kinds[name] == "matrix"),
        weight_bytes=_weight_bytes(model, made),
        largest_layer=max(blocks, default=0),
        layers=config.num_hidden_layers,
        vocab_size=model.classes or config.vocab_size,
        forward_flops=2 * multiplied + attention / 3,
        training_flops=training,
    )


def _weight_bytes(model: Model, made: Any) -> float:
    """Whole weights in float32; quantized ones by their format, with the rest in 16 bit."""
    total = 4.0 * sum(map(torch.numel, made.parameters()))
    if not model.method or model.quantization is None:
        return total
    bare = made if model.lora is None else made.get_base_model()
    whole = whole_modules(bare)
    linears = [name for name in matrices_of(bare) if name not in whole]
    try:
        promised = promised_bytes(bare, linears, scheme_of(model.method, model.quantization))
    except (KeyError, AttributeError, ValueError):  # layers under an adapter, or a format that is not known
        return total / 4
    adapter = sum(each.numel() for each in made.parameters() if each.requires_grad) if model.lora is not None else 0
    return promised + 4.0 * adapter


def kept_for_backward(
    model: Model, rows: int, length: int, is_half: bool, is_masked: bool, checkpointing: bool
) -> float:
    """Bytes that the forward pass of a batch keeps for the backward pass, but for the logits: every tensor that is
    saved, each storage once, without the weights. The pass is done on tensors that have no memory."""
    a_row = _kept_of_a_row(model.key, length, is_half, is_masked, model)
    if not checkpointing:
        return rows * a_row
    shape, config = shape_of(model, length), model.config.get_text_config()
    return rows * (shape.layers * length * config.hidden_size * (2 if is_half else 4) + a_row / max(shape.layers, 1))


@functools.lru_cache(maxsize=256)
def _kept_of_a_row(key: str, length: int, is_half: bool, is_masked: bool, model: Model) -> float:
    kept: dict[int, int] = {}
    with torch.device("meta"):
        made = build(dataclasses.replace(model, method="", quantization=None)).train()
    decoder = decoder_of(made)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {
            name: torch.empty(each.shape, dtype=each.dtype).requires_grad_(each.requires_grad)
            for name, each in (*decoder.named_parameters(), *decoder.named_buffers())
        }
        own = {each.untyped_storage()._cdata for each in weights.values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        inputs: dict[str, Any] = {"input_ids": torch.zeros(1, length, dtype=torch.long), "use_cache": False}
        if is_masked and not model.classes:
            inputs["position_ids"] = torch.arange(length)[None]
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=is_half),
        ):
            outputs = functional_call(decoder, weights, kwargs=inputs)  # alive until all is counted
    del outputs
    halves = 2 * sum(map(torch.numel, made.parameters())) if is_half else 0
    return max(sum(kept.values()) - halves, 0)  # the weights in half precision are there once for all rows
