"""Weights in few bits, by the quantizers of transformers: what runs here, what it promises, the folder it makes."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from hfkit.artifacts.manifest import Metrics, is_adapter
from hfkit.data.chat import set_generation_ids
from hfkit.data.tasks import Task
from hfkit.errors import HfkitError, did_you_mean, reason
from hfkit.model.loading import auto_class_of, load_config, load_model
from hfkit.model.matrices import MATRICES, matrices_of, weight_of
from hfkit.model.quantized import bitsandbytes_config, empty_model, quantized_modules, whole_modules
from hfkit.model.vocabulary import grow
from hfkit.recipe.fields import Arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = {"gptq": ("gptqmodel", "optimum"), "hqq": ("hqq",), "torchao": ("torchao",)}
ROOM = 1.02  # of the promised bytes, for what a file says of itself


class Scheme(NamedTuple):
    """What quantized weights take on disk: the bits of each, and what comes beside them.

    Args:
        group: so many weights of a row share a scale; None for all of them.
        group_bytes: of that scale, and of what else is kept for the group.
        matrix_bytes: what comes with each matrix.
    """

    bits: int
    group: int | None
    group_bytes: float
    matrix_bytes: int

    def bytes_of(self, matrix: nn.Module) -> float:
        outputs, inputs = weight_of(matrix).shape
        groups = outputs * -(-inputs // (self.group or inputs))
        return outputs * inputs * self.bits / 8 + groups * self.group_bytes + self.matrix_bytes


def scheme_of(method: str, options: Arguments) -> Scheme:
    """Return what the format of a method promises."""
    if method == "bitsandbytes" and options.get("load_in_8bit"):
        return Scheme(8, None, 4, 64)
    if method == "bitsandbytes":  # a float32 for each block; or one byte, and a float32 for each 256 of those
        return Scheme(4, 64, 1 + 4 / 256 if options.get("bnb_4bit_use_double_quant") else 4, 2048)
    if method == "torchao":
        is_int4 = "Int4" in options["quant_type"]
        return Scheme(4 if is_int4 else 8, 32 if is_int4 else None, 8, 64)
    return Scheme(options["bits"], options.get("group_size", 128), 8, 4096)  # gptq keeps the group of each input too


def problems(method: str, options: Arguments) -> Iterator[tuple[str, str]]:
    """Yield why a method does not run here."""
    if method == "bitsandbytes":
        if bool(options.get("load_in_8bit")) == bool(options.get("load_in_4bit")):
            yield "quantization", "must say either load_in_8bit: true or load_in_4bit: true"
        if (kind := options.get("bnb_4bit_quant_type", "nf4")) not in ("nf4", "fp4"):
            yield "quantization.bnb_4bit_quant_type", f"must be nf4 or fp4, got {kind!r}"
        return
    missing = [name for name in PACKAGES.get(method, ()) if importlib.util.find_spec(name) is None]
    if method != "gptq" and AUTO_QUANTIZER_MAPPING[method].get_quantize_ops is HfQuantizer.get_quantize_ops:
        version = f"transformers {transformers.__version__}"
        yield "method", f"{method}: {version} makes no such models; use bitsandbytes, torchao or gptq"
    elif missing:
        yield "method", f"{method}: needs {' and '.join(missing)}: pip install 'hfkit[{method}]'"
    elif method == "torchao":
        import torchao.quantization

        kinds = [name for name in vars(torchao.quantization) if name.endswith("Config")]
        if (name := options["quant_type"]) not in kinds:
            yield "quantization.quant_type", f"{name!r}: torchao has no such class, {did_you_mean(name, kinds)}"
        elif (
            not torch.cuda.is_available() and name.startswith(("Int4", "Float8")) and name != "Float8WeightOnlyConfig"
        ):
            yield "quantization.quant_type", f"{name}: needs a GPU; use Int8WeightOnlyConfig or Float8WeightOnlyConfig"


def problems_with(
    path: str, method: str, options: Arguments, has_classes: bool, trust_remote_code: bool
) -> Iterator[tuple[str, str]]:
    """Yield why the model at `path` cannot be quantized, from its configuration.

    Args:
        options: arguments of the method.

    Raises:
        HfkitError: if there is none that can be read.
    """
    config = load_config(path, trust_remote_code)
    if not is_adapter(path) and getattr(config, "quantization_config", None) is not None:
        yield "model", f"{path}: is quantized already; name the model that it was made from"
        return
    empty = empty_model(config, auto_class_of(config, has_classes), trust_remote_code)
    whole = whole_modules(empty)
    matrices = [matrix for name, matrix in matrices_of(empty).items() if name not in whole]
    takes = MATRICES if method in ("bitsandbytes", "gptq") else (nn.Linear,)
    if not any(isinstance(matrix, takes) for matrix in matrices):
        kinds = ", ".join(sorted({type(matrix).__name__ for matrix in matrices})) or "no linear maps"
        rule = f"{method} takes nn.Linear alone, and beside its head a model of type {config.model_type} has"
        yield "method", f"{rule} {kinds}; use bitsandbytes"
    elif method == "bitsandbytes":
        try:
            bitsandbytes_config(options, empty)
        except HfkitError as error:
            yield "quantization", str(error).removeprefix("quantization: ")


def quantize(
    path: str,
    output: Path,
    method: str,
    options: Arguments,
    task: Task,
    texts: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    trust_remote_code: bool,
) -> Metrics:
    """Write the quantized model and its tokenizer.

    Args:
        path: a whole model, no adapter.
        options: arguments of the method.
        texts: for a method that looks at some.

    Returns:
        `quantized_modules`, `whole_modules` (linear maps that stay as they are), `promised_bytes`, `weight_bytes`.

    Raises:
        HfkitError: if the method refuses the model, left it whole, or does not keep what its format promises.
    """
    config = load_config(path, trust_remote_code)
    empty = empty_model(config, auto_class_of(config, task.has_classes), trust_remote_code)
    grow(empty, tokenizer, path)
    settings = _settings(method, options, empty, tokenizer, texts)
    model: Any = load_model(
        path,
        task.has_classes,
        dtype=torch.bfloat16,
        quantization=settings,
        trust_remote_code=trust_remote_code,
    )
    done = quantized_modules(model)
    left = [name for name in matrices_of(empty) if name not in done]
    if not done:
        raise HfkitError(f"method: {method} left every matrix of {path} whole; use another method")
    if heads := sorted(set(done) & set(whole_modules(empty))):
        raise HfkitError(f"method: {method} has quantized {', '.join(heads)}, which should stay whole; use another")
    if method == "gptq":
        model.config.quantization_config.dataset = None  # or else the texts themselves would stand in config.json
    if not task.has_classes:
        set_generation_ids(model, tokenizer, task.is_chat)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    promised = promised_bytes(empty, done, scheme_of(method, options))
    if size > promised * ROOM:
        message = f"{size:,} bytes of weights were written, and {method} promises {promised:,.0f}"
        raise HfkitError(f"quantization: {message}; use another scheme")
    return {"quantized_modules": done, "whole_modules": left, "promised_bytes": promised, "weight_bytes": size}


def promised_bytes(empty: nn.Module, quantized: list[str], scheme: Scheme) -> int:
    """Return what weights should take on disk: those of `quantized` by the scheme, all others in 16 bit, tied ones
    once."""
    modules = dict(empty.named_modules())
    of_quantized = {f"{name}.weight" for name in quantized}
    tied = set(getattr(empty, "all_tied_weights_keys", {}))
    rest = sum(
        2 * parameter.numel()
        for name, parameter in empty.named_parameters(remove_duplicate=False)
        if name not in of_quantized and name not in tied
    )
    headers = 128 * len(list(empty.parameters()))  # names, shapes and places of the tensors
    return round(sum(scheme.bytes_of(modules[name]) for name in quantized) + rest + headers)


def _settings(
    method: str, options: Arguments, empty: Any, tokenizer: "PreTrainedTokenizerBase", texts: list[str]
) -> Any:
    """Return the configuration of a method for a model, whose list of modules to skip adds to those that stay
    whole."""
    whole = whole_modules(empty)
    try:
        if method == "bitsandbytes":
            return bitsandbytes_config(options, empty)
        if method == "torchao":
            import torchao.quantization

            kind = getattr(torchao.quantization, options["quant_type"])(**options.get("arguments", {}))
            skipped = _full_names(options.get("modules_to_not_convert") or [], empty)
            return transformers.TorchAoConfig(kind, modules_to_not_convert=[*whole, *skipped])
        if method == "hqq":
            return transformers.HqqConfig(
                **{**options, "skip_modules": [*whole, *(options.get("skip_modules") or [])]}
            )
        return transformers.GPTQConfig(**options, tokenizer=tokenizer, dataset=texts)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise HfkitError(f"quantization: {reason(error)}; correct the arguments of {method}") from None


def _full_names(names: list[str], empty: nn.Module) -> list[str]:
    """Return the modules that end with these names: torchao leaves only those whole that are named in full."""
    full_names = []
    for name in names:
        full = [module for module, _ in empty.named_modules() if f".{module}".endswith(f".{name}")]
        if not full:
            raise ValueError(f"modules_to_not_convert={name}: names no module of the model")
        full_names += full
    return full_names
