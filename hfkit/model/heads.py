"""A causal model as its decoder, which gives hidden states, and its head, the linear map from them to logits."""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING_ONLY = "distillation_projections."  # weights that a distillation learns beside the student
PROBE_TOKENS = 4
PROBE_SIZE = 1e3  # of the largest logit: caps are at 30 to 50


def causal_of(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the causal model itself, also where an adapter is on it."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    causal = causal_of(model)
    return getattr(causal, causal.base_model_prefix)


def head_of(model: "PreTrainedModel") -> nn.Module:
    return causal_of(model).get_output_embeddings()


@contextlib.contextmanager
def portable_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Use attention that runs on every device and in every precision: kernels such as flash are for training alone."""
    config = causal_of(model).config
    own = config._attn_implementation
    if own not in (None, "eager", "sdpa"):
        config._attn_implementation = "sdpa" if causal_of(model)._supports_sdpa else "eager"
    try:
        yield
    finally:
        config._attn_implementation = own


@torch.no_grad()
def is_plain(model: "PreTrainedModel") -> bool:
    """Return whether its logits are its head's output for its decoder's last hidden states, and nothing more.

    Some models cap or scale their logits (Gemma 2, Cohere, Granite). A forward pass of a few tokens shows it: the
    head is given what the decoder gives, but so much larger that a cap would show in a model of any weights.
    """
    causal = causal_of(model)
    head = causal.get_output_embeddings()
    if type(head) is not nn.Linear or not isinstance(getattr(causal, causal.base_model_prefix, None), nn.Module):
        return False
    seen: dict[str, torch.Tensor] = {}

    def enlarge(_: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen["states"] = args[0]
        size = nn.functional.linear(args[0], head.weight).abs().amax().clamp_min(1e-6)
        return args[0] * (PROBE_SIZE / size)

    def keep(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen["logits"] = output.clone()

    ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] % head.weight.shape[0]
    was_training = causal.training
    causal.eval()
    hooks = [head.register_forward_pre_hook(enlarge), head.register_forward_hook(keep)]
    with portable_attention(model):
        try:
            logits = causal(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        states = decoder_of(model)(input_ids=ids, use_cache=False)[0]
    causal.train(was_training)
    pairs = ((states, seen.get("states")), (logits, seen.get("logits")))
    return all(
        other is not None and one.shape == other.shape and torch.allclose(one.float(), other.float(), 1e-3, 1e-3)
        for one, other in pairs
    )


def compute_loss_with(model: "PreTrainedModel", loss_of: Callable[..., torch.Tensor]) -> None:
    """Let `model(..., labels=...)` in training give the loss that `loss_of` makes of hidden states, without logits.

    It stays the model's own forward pass: wrappers that gather or reduce its weights see nothing new.

    Args:
        model: one for which `is_plain` holds, or an adapter on one.
        loss_of: called with the decoder's outputs, the head, the labels and num_items_in_batch.
    """
    causal = causal_of(model)
    decoder, plain = decoder_of(model), causal.forward

    @wraps(type(causal).forward)
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or not self.training:
            return plain(*args, labels=labels, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        outputs = decoder(*args, **{**kwargs, "use_cache": False, "return_dict": True})
        return CausalLMOutput(loss=loss_of(outputs, head_of(model), labels, items))

    causal.forward = MethodType(forward, causal)  # type: ignore[method-assign]
