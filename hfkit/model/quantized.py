"""Models of quantized weights: which of their modules stay whole, and which do not."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from hfkit.errors import HfkitError
from hfkit.model.matrices import MATRICES, as_conv1d, matrices_of, weight_of
from hfkit.recipe.fields import Arguments
from hfkit.runtime.devices import has_bf16

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BLOCK = 64  # weights of bitsandbytes' 4-bit schemes that share a scale
TILE = 32  # rows that its kernel for AVX512-BF16 takes at once
HEADS = ("lm_head", "score", "classifier", "classification_head")


def empty_model(config: "PretrainedConfig", auto_class: Any, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Return the modules and shapes of a model, without memory for its weights."""
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def whole_modules(model: "PreTrainedModel") -> list[str]:
    """Return the modules that no scheme should quantize: output embeddings, what is tied to the input embeddings, and
    heads of classes. Every quantizer of transformers leaves them alone, unless it is given a list of its own."""
    heads = {name for name, _ in model.named_children() if name in HEADS}
    return sorted(heads | set(get_keys_to_not_convert(model)))


def bitsandbytes_config(quantization: Arguments, model: "PreTrainedModel") -> Any:
    """Return the `BitsAndBytesConfig` of a recipe's section, whose list of modules to skip adds to `whole_modules`: as
    it is, it would replace them, and the head would be quantized (transformers #45674). Where a GPU multiplies
    bfloat16, 4-bit weights are multiplied in it: the library's own default is float32, for which tensor cores do
    nothing.

    Raises:
        HfkitError: for a model whose sizes the scheme cannot take on this machine.
    """
    from transformers import BitsAndBytesConfig

    skipped = {*whole_modules(model), *(quantization.get("llm_int8_skip_modules") or [])}
    if quantization.get("load_in_4bit") and not torch.cuda.is_available():
        _check_blocks(model, skipped)
    if has_bf16(torch.device("cuda")):
        quantization = {"bnb_4bit_compute_dtype": "bfloat16", **quantization}
    return BitsAndBytesConfig(**{**quantization, "llm_int8_skip_modules": sorted(skipped)})


def _check_blocks(model: "PreTrainedModel", skipped: set[str]) -> None:
    """bitsandbytes' 4-bit kernels for CPUs fail in the first forward pass where blocks run over the ends of rows, and
    those for AVX512-BF16 also where rows do not come in whole tiles."""
    from bitsandbytes.functional import has_avx512bf16

    rows = TILE if has_avx512bf16() else 1
    for name, matrix in matrices_of(model).items():
        if any(part in skipped for part in (name, name.split(".")[-1])):
            continue
        outputs, inputs = weight_of(matrix).shape
        for size, unit, what in ((inputs, BLOCK, "inputs"), (outputs, rows, "outputs")):
            if size % unit:
                raise HfkitError(
                    f"quantization: {name} has {size} {what}, and 4-bit weights on this CPU need a multiple of "
                    f"{unit}; use load_in_8bit, or a model of such sizes"
                )


def quantized_modules(model: nn.Module) -> list[str]:
    """Return the names of the linear maps whose weights are quantized, by whatever library."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, MATRICES) or "Linear" in type(module).__name__) and not _is_whole(module)
    ]


def _is_whole(module: nn.Module) -> bool:
    """Return whether the weight is a plain parameter of floating-point numbers: libraries keep theirs in classes of
    their own, whatever the type of the numbers that they pack."""
    weight = getattr(module, "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point()


def dequantized(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a quantized model with plain float32 weights, which saves as the model that it was made from."""
    turned = [
        name for name, module in model.named_modules() if issubclass(getattr(module, "source_cls", object), Conv1D)
    ]
    model = model.dequantize().float()
    for name in turned:  # bitsandbytes gives back nn.Linear for whatever it has replaced
        model.set_submodule(name, as_conv1d(model.get_submodule(name)))
    model._weight_conversions = None  # of quantized files, which would fail where this model is saved
    return model
