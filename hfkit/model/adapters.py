"""Adapters: made for a model, saved, merged into their base."""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfkit.artifacts.manifest import is_adapter
from hfkit.errors import HfkitError
from hfkit.model.loading import head_modules, load_model
from hfkit.recipe.fields import Arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRIFT_TOKENS = 256
MOST_DRIFT = 0.1  # of what an adapter changes in the logits
# What rounding alone may change in the logits, as a share of them: by the dtype of the weights, or where kernels of
# quantized weights are replaced by those of whole ones.
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "quantized": 0.1}


def adapt(model: "PreTrainedModel", lora: Arguments, has_classes: bool, is_quantized: bool) -> Any:
    """Return the model with a new adapter, the only thing that is trained.

    Args:
        lora: arguments of `peft.LoraConfig`. By default it adapts every linear layer but the head.

    Raises:
        HfkitError: in PEFT's words, if the arguments do not fit the model.
    """
    import peft

    if is_quantized:
        # Norms in float32, inputs that pass gradients on. Recomputing activations is the recipe's to choose.
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes' kernel for such processors passes no gradients on, and once a model is evaluated with
                # it, its weights are packed for good.
                module.support_avx512bf16_for_cpu = False
    kind = peft.TaskType.SEQ_CLS if has_classes else peft.TaskType.CAUSAL_LM
    if has_classes:  # a head that is new is trained whole, and saved with the adapter
        heads = head_modules(model)
        lora = {**lora, "modules_to_save": [*dict.fromkeys([*(lora.get("modules_to_save") or []), *heads])]}
        lora.setdefault("exclude_modules", heads)
    try:
        config = peft.LoraConfig(**{"target_modules": "all-linear", **lora}, task_type=kind)
        return peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise HfkitError(f"lora: {error}") from None


def merge(adapter: Path, output: Path, has_classes: bool, quantization: Arguments | None, ids: torch.Tensor) -> float:
    """Write the base with the adapter's weights added, in 16 or 32 bit, and measure what that changed.

    The base is loaded afresh: of a quantized one the dequantized weights take the adapter, for merging into 4-bit
    weights would round it away, and bitsandbytes dequantizes wrongly after a forward pass on a CPU.

    Args:
        ids: tokens to compare the logits on, (1, tokens).

    Returns:
        The drift: the root mean square of the difference between the logits of the adapted and of the merged model,
        as a share of that between the logits of the adapted model and of its base.

    Raises:
        HfkitError: if the merged model is another than the adapted one; nothing is left in `output`. Allowed is a
            difference of a tenth of what the adapter changes, or of `ROUNDING` of the logits themselves.
    """
    ids = ids[:, :DRIFT_TOKENS]
    adapted = load_model(str(adapter), has_classes, quantization=quantization)
    is_quantized = getattr(adapted.config, "quantization_config", None) is not None
    dtype = str(adapted.dtype).removeprefix("torch.")
    expected = _logits(adapted, ids)
    with adapted.disable_adapter():
        base = _logits(adapted, ids)
    del adapted
    fresh = load_model(str(adapter), has_classes, quantization=quantization, dequantize=True)
    merged(fresh).save_pretrained(output)
    merged_logits = _logits(load_model(str(output), has_classes), ids)
    effect, difference, size = (_rms(logits) for logits in (expected - base, merged_logits - expected, expected))
    drift = difference / max(effect, 1e-12)
    rounding = ROUNDING["quantized" if is_quantized else dtype]
    if not difference <= max(MOST_DRIFT * effect, rounding * size):
        shutil.rmtree(output)
        raise HfkitError(
            f"merge: the merged model is not the one that was trained: its logits are off by {drift:.2g} of what the "
            f"adapter changes, and at most {MOST_DRIFT} is allowed. The adapter is whole, in {adapter}: use it on its "
            f"base, or leave out of `lora` what cannot be merged"
        )
    return drift


def merged(adapted: Any) -> Any:
    """Return the base of a `peft.PeftModel` with the adapter's weights in it, changed in place.

    An adapter on the head or the embeddings alone makes two matrices of what was one: so the two are parted before,
    and only where they are still alike do they stay tied.
    """
    base = adapted.get_base_model()
    embedding = base.get_input_embeddings()
    shared = getattr(embedding, "original_module", embedding).weight
    is_tied = False
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is shared:
            module.weight, is_tied = torch.nn.Parameter(shared.detach().clone()), True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        model = adapted.merge_and_unload(safe_merge=True)
    if is_tied:
        weights = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
        is_alike = torch.equal(*weights)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = is_alike
        if is_alike:
            model.tie_weights()
        else:
            model.all_tied_weights_keys = {}
    return model


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


@torch.no_grad()
def _logits(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids.to(model.device)).logits.float().cpu()


def refuse_adapter(path: str) -> str | None:
    """Return why a model cannot be trained further, if it is an adapter."""
    if is_adapter(path):
        return f"{path}: is an adapter; train it with `merge: true` and name its folder merged/"
    return None
