"""Adapters: made for a model, saved, merged into their base."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfkit.errors import HfkitError
from hfkit.manifest import is_adapter
from hfkit.model.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRIFT_TOKENS = 256


def adapt(model: "PreTrainedModel", lora: dict[str, Any], task: str, is_quantized: bool) -> Any:
    """The model with a new adapter, the only thing that is trained.

    Args:
        lora: arguments of `peft.LoraConfig`. By default it adapts every linear layer but the head.

    Raises:
        HfkitError: in PEFT's words, if the arguments do not fit the model.
    """
    import peft

    if is_quantized:
        # Norms in float32, inputs that pass gradients on. Recomputing activations is the recipe's to choose.
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    kind = peft.TaskType.SEQ_CLS if task == "classify" else peft.TaskType.CAUSAL_LM
    try:
        config = peft.LoraConfig(**{"target_modules": "all-linear", **lora}, task_type=kind)
        return peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise HfkitError(f"lora: {error}") from None


def merge(adapter: Path, output: Path, task: str, quantization: dict[str, Any] | None, ids: torch.Tensor) -> float:
    """Write the base with the adapter's weights added, in 16 or 32 bit, and measure what that changed.

    The base is loaded afresh: of a quantized one the dequantized weights take the adapter, for merging into 4-bit
    weights would round it away, and bitsandbytes dequantizes wrongly after a forward pass on a CPU.

    Args:
        ids: tokens to compare the logits on, (1, tokens).

    Returns:
        The drift: the root mean square of the difference between the logits of the adapted and of the merged model,
        as a share of that between the logits of the adapted model and of its base.
    """
    ids = ids[:, :DRIFT_TOKENS]
    adapted = load_model(str(adapter), task, quantization=quantization)
    expected = _logits(adapted, ids)
    with adapted.disable_adapter():
        base = _logits(adapted, ids)
    del adapted
    fresh = load_model(str(adapter), task, quantization=quantization, dequantize=True)
    merged = fresh.merge_and_unload(safe_merge=True)
    merged.save_pretrained(output)
    found = _logits(load_model(str(output), task), ids)
    effect = (expected - base).square().mean().sqrt().item()
    return (found - expected).square().mean().sqrt().item() / max(effect, 1e-12)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids.to(model.device)).logits.float().cpu()


def refuse_adapter(place: str) -> str | None:
    """Why a model cannot be trained further, if it is an adapter."""
    if is_adapter(place):
        return f"{place}: is an adapter; train it with `merge: true` and name its folder merged/"
    return None
