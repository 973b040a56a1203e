"""Opening the model that a stage is given: a folder or a Hub id, a base with an adapter, quantized or whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import ADAPTER, Json, is_adapter
from hfkit.errors import HfkitError, reason, way_to
from hfkit.model.vocabulary import grow
from hfkit.recipe.fields import Arguments
from hfkit.runtime.distributed import say

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from hfkit.model import HfkitConfig


NO_LIMIT = 10**9  # tokenizers that know no longest text name a number far above it
USUAL_WINDOW = 1024  # of models that know no longest text either


def base_of(path: str) -> str:
    """Return the base model of an adapter, a folder or an id on the Hub; of anything else, the place itself.

    Raises:
        HfkitError: if the base is a folder that is gone, or not the one that the adapter was trained on, as far as
            that can be told without loading it: by its digest, or where none was kept by the sizes of its weights.
    """
    if not is_adapter(path):
        return path
    base = (manifest.read_json(Path(path), ADAPTER) or {}).get("base_model_name_or_path") or ""
    digest = _made(path).get("inputs", {}).get("model", {}).get("digest")
    looks_local = base.startswith((".", "/", "runs/")) or Path(base).is_dir()
    if looks_local and not Path(base).is_dir():
        raise HfkitError(f"{path}: its base model {base} is not there; put it back, or correct {path}/{ADAPTER}")
    if digest is not None and Path(base).is_dir() and manifest.content_of(base) != digest:
        raise HfkitError(
            f"{path}: was trained on another base model than {base} is now (sha256 {digest[:16]}, now "
            f"{manifest.content_of(base)[:16]}); put the old base back, or train the adapter again"
        )
    if digest is None and Path(base).is_dir():
        _check_sizes(path, base)
    return base


def base_quantization(path: str) -> Arguments | None:
    """Return how the base of an adapter was quantized when the adapter was trained; None where it was not."""
    return _made(path).get("recipe", {}).get("quantization") if is_adapter(path) else None


def _made(path: str) -> Json:
    """Return what is known of how a folder was made, or is being made: a result is measured before it is finished."""
    return manifest.read_json(Path(path)) or manifest.read_json(Path(path), manifest.STARTED) or {}


def _check_sizes(path: str, base: str) -> None:
    """Hold the inputs of an adapter's matrices, (rank, inputs), against the weights that they go with."""
    sizes = _shapes(base)
    for name, (_, *inputs) in _shapes(path).items():
        if name.endswith(".lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            if weight in sizes and not {*inputs} <= {*sizes[weight]}:
                raise HfkitError(
                    f"{path}: does not fit its base model {base}: {weight} is {sizes[weight]} there, and the adapter "
                    f"takes {inputs[0]} inputs; correct base_model_name_or_path in {path}/{ADAPTER}"
                )


def _shapes(folder: str) -> dict[str, list[int]]:
    """Return, of each weight of a folder, its shape. Those of packed integers are left out, whose shapes say
    little."""
    from safetensors import safe_open

    shapes = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
            shapes |= {
                name: weight.get_shape() for name, weight in slices.items() if weight.get_dtype() not in ("U8", "I8")
            }
    return shapes


def load_config(path: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """Return the configuration of a model; of an adapter its own, if it is kept beside it, or else its base's.

    Raises:
        HfkitError: if there is none that can be read.
    """
    import transformers

    import hfkit.model  # noqa: F401 registers the hfkit model

    base = base_of(path)
    source = path if (Path(path) / "config.json").is_file() else base
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # files, network and Hub fail in many ways
        raise HfkitError(f"{path}: no model can be loaded: {reason(error)}; {way_to(path)}") from None


def is_classifier(path: str, config: "PretrainedConfig") -> bool | None:
    """Return whether a model has a head of classes; None where its files do not say."""
    if is_adapter(path):
        return (manifest.read_json(Path(path), ADAPTER) or {}).get("task_type") == "SEQ_CLS"
    names = config.architectures
    return None if not names else any("SequenceClassification" in name for name in names)


def window_of(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the most tokens that a model takes, by its positions and by its tokenizer."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    sizes = [size for size in (positions, tokenizer.model_max_length) if size and size < NO_LIMIT]
    return min(sizes, default=USUAL_WINDOW)


def new_config(fields: Arguments, tokenizer: "PreTrainedTokenizerBase", sequence_length: int) -> "HfkitConfig":
    """Return the configuration of a new model: a recipe's fields, and what the tokenizer and the rows decide."""
    from hfkit.model import HfkitConfig

    defaults = {"vocab_size": len(tokenizer), "max_position_embeddings": sequence_length}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return HfkitConfig(**{**defaults, **fields, **special})


def auto_class_of(config: "PretrainedConfig", has_classes: bool) -> Any:
    """Return the class that opens a model of this configuration, with a head of classes or one that generates."""
    import transformers

    if has_classes:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def load_model(
    path: str,
    has_classes: bool = False,
    *,
    labels: list[str] | None = None,
    is_multi_label: bool = False,
    dtype: "torch.dtype | str" = "auto",
    quantization: "dict[str, Any] | QuantizationConfigMixin | None" = None,
    dequantize: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Return the model at `path`, ready to be used; with an adapter, a `peft.PeftModel` on its base.

    Each token that was added to its tokenizer has an embedding (`hfkit.model.vocabulary.grow`).

    Args:
        has_classes: whether the model has a head of classes, or one that generates.
        labels: the names of the classes, for a head that is made anew. By default the model's own.
        is_multi_label: whether that head gives each class a probability of its own.
        dtype: of the weights. Trainable models need float32: `auto` takes what the file has.
        quantization: arguments of `BitsAndBytesConfig`, or the configuration of any quantizer.
        dequantize: give a quantized base back as plain float32 weights, before it takes its adapter.

    Raises:
        HfkitError: if weights are missing or left over, or the adapter does not fit.
    """
    from hfkit.model.quantized import bitsandbytes_config, dequantized, empty_model

    config = load_config(path, trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    auto_class = auto_class_of(config, has_classes)
    if has_classes:
        if labels is not None:
            kind = "multi" if is_multi_label else "single"
            options["problem_type"] = f"{kind}_label_classification"
        elif is_adapter(path):  # what its base does not have
            labels = list(config.id2label.values())
            options["problem_type"] = config.problem_type
        if labels is not None:
            options["id2label"] = dict(enumerate(labels))
            options["label2id"] = {label: index for index, label in enumerate(labels)}
            options["num_labels"] = len(labels)
    base = base_of(path)
    try:
        if isinstance(quantization, dict):
            empty = empty_model(config, auto_class, trust_remote_code)
            options["quantization_config"] = bitsandbytes_config(quantization, empty)
        elif quantization is not None:
            options["quantization_config"] = quantization
        model, info = auto_class.from_pretrained(base, output_loading_info=True, **options)
    except Exception as error:
        raise HfkitError(f"{base}: the model cannot be loaded: {reason(error)}") from None
    missing, left_over = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if has_classes:  # its head may be new, and that of another task is not needed
        new = [key for key in missing if not _is_of_base(key, model)]
        missing = [key for key in missing if key not in new]
        left_over = [key for key in left_over if _is_of_base(key, model)]
        if is_adapter(path) and hasattr(config, "thresholds"):
            model.config.thresholds = config.thresholds
        if new and labels is not None and not is_adapter(path):
            say(f"  the head of classes is new: {', '.join(new)}")
    _check_keys(base, missing, [*left_over, *map(str, info["mismatched_keys"])])
    if dequantize and getattr(model.config, "quantization_config", None) is not None:
        model = dequantized(model)
    if (tokenizer := _tokenizer_beside(path)) is not None:
        grow(model, tokenizer, path)
    return _with_adapter(model, path) if is_adapter(path) else model


def open_model(path: str, has_classes: bool = False, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Return the model at `path` to be asked and not trained: as it was made, on the device, in its evaluation
    mode."""
    import torch

    quantization = base_quantization(path)
    model: Any = load_model(path, has_classes, quantization=quantization, trust_remote_code=trust_remote_code)
    if getattr(model.config, "quantization_config", None) is None:
        model.to(torch.accelerator.current_accelerator() or "cpu")
    return model.eval()


def _tokenizer_beside(path: str) -> Any:
    """Return the tokenizer of a model; None where it has none, or one that needs code of its own."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception:  # files, network and Hub fail in many ways; who needs one says so
        return None


def _with_adapter(model: "PreTrainedModel", path: str) -> Any:
    import peft
    import transformers

    config = peft.PeftConfig.from_pretrained(path)
    config.inference_mode = True
    adapted = peft.get_peft_model(model, config)
    weights = peft.load_peft_weights(path, device="cpu")
    try:
        result = peft.set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:
        raise HfkitError(f"{path}: the adapter does not fit its base: {reason(error)}") from None
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save." in key]
    _check_keys(path, missing, result.unexpected_keys)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return adapted


def _is_of_base(key: str, model: "PreTrainedModel") -> bool:
    """Return whether a weight is of the model below the heads. Its pooler is a part of the head: not every task has
    one."""
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key


def head_modules(model: "PreTrainedModel") -> list[str]:
    """Return the names of the modules with weights that are above the base model, the pooler among them."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters())
    return [name for name in owners if not _is_of_base(f"{name}.", model)]


def _check_keys(path: str, missing: list[str], left_over: list[str]) -> None:
    for what, keys in (("are missing", missing), ("have no place in the model", left_over)):
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (" ..." if len(keys) > 5 else "")
            raise HfkitError(f"{path}: {len(keys)} weights {what}: {shown}; the files are not those of this model")
