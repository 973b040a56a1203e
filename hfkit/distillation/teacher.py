"""The teacher beside the student: what it makes of a batch, without gradients."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hfkit.artifacts.manifest import is_adapter
from hfkit.data.rows.learned import places, taken
from hfkit.distillation.settings import Distillation
from hfkit.errors import HfkitError
from hfkit.model.adapters import merged
from hfkit.model.heads import decoder_of, head_of, is_plain
from hfkit.model.loading import base_quantization, load_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "position_ids")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Layers(NamedTuple):
    """What a forward pass left in the layers of a model.

    Attributes:
        hidden_states: after each layer, each (batch, tokens, hidden).
        attentions: weights of each layer, each (batch, heads, query, key); empty unless they were asked for.
        projections: (layer, name) -> queries, keys and values, each (batch, heads, tokens, head_dim).
    """

    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]
    projections: dict[tuple[int, str], torch.Tensor]


class Watch:
    """Keeps the queries, keys and values of some layers of a model, as their linear maps give them.

    Raises:
        HfkitError: if the model's attention is not of three linear maps named q_proj, k_proj and v_proj.
    """

    def __init__(self, model: nn.Module, layers: set[int], whose: str):
        self.vectors: dict[tuple[int, str], torch.Tensor] = {}
        config: Any = model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        modules = dict(decoder_of(model).named_modules())
        for layer in layers:
            for name in PROJECTIONS:
                module = modules.get(f"layers.{layer}.self_attn.{name}")
                if module is None:
                    raise HfkitError(
                        f"losses: the attention of the {whose} has no {name} in layer {layer}, so that relations "
                        f"cannot be compared; use `kind: maps`"
                    )
                module.register_forward_hook(self._keeping((layer, name), width))

    def _keeping(self, key: tuple[int, str], width: int) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.vectors[key] = output.unflatten(-1, (-1, width)).transpose(1, 2)

        return keep

    def take(self) -> dict[tuple[int, str], torch.Tensor]:
        vectors, self.vectors = self.vectors, {}
        return vectors


class Teacher:
    """A causal model that is asked and never changed.

    Args:
        model: on its device, in its own dtype.
        watched: layers whose queries, keys and values are wanted.
        options: such as `output_hidden_states`, for its forward pass.
        compiled: whether to compile the decoder.
    """

    def __init__(self, model: "PreTrainedModel", watched: set[int], options: dict[str, bool], compiled: bool = False):
        self.model = model.requires_grad_(False).eval()
        self.watch = Watch(model, watched, "teacher") if watched else None
        self.options = options
        self.head: Any = head_of(model)
        self.decoder = torch.compile(decoder_of(model)) if compiled else decoder_of(model)

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Layers | None]:
        """Return the hidden states that the head takes, (batch, tokens, hidden), and the layers if asked."""
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        outputs = self.decoder(**inputs, use_cache=False, return_dict=True, **self.options)
        layers = layers_of(outputs, self.watch) if self.options or self.watch else None
        return outputs.last_hidden_state, layers

    @torch.no_grad()
    def logits(self, states: torch.Tensor, width: int) -> torch.Tensor:
        """Return the first `width` logits of some hidden states, (tokens, hidden) -> (tokens, width)."""
        bias = self.head.bias
        return nn.functional.linear(states, self.head.weight[:width], bias if bias is None else bias[:width])


def load_teacher(settings: Distillation, path: str, device: torch.device) -> "PreTrainedModel":
    """Return the teacher's model, in the dtype of its files; an adapter is merged into its base.

    Raises:
        HfkitError: if its logits are not a linear map of its hidden states.
    """
    quantization = settings.teacher_quantization or base_quantization(path)
    eager = any(loss.kind == "maps" for loss in settings.losses)
    model: Any = load_model(
        path,
        quantization=quantization,
        attn_implementation="eager" if eager else None,
        trust_remote_code=settings.trust_remote_code,
    )
    if getattr(model.config, "quantization_config", None) is None:
        model = (merged(model) if is_adapter(path) else model).to(device)
    if not is_plain(model):
        raise HfkitError(f"teacher: the logits of {path} are not a linear map of its hidden states; choose another")
    return model


def placed(model: "PreTrainedModel", accelerator: "Accelerator") -> Any:
    """Return the model where Accelerate puts it: whole on each device, or in shards where the student is."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(model, evaluation_mode=True)
    from torch.distributed.fsdp import fully_shard

    model.to(accelerator.device)
    for module in list(decoder_of(model).modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return model


def layers_of(outputs: Any, watch: Watch | None) -> Layers:
    hidden_states = tuple(outputs.hidden_states or ())[1:]  # the first is the embedding
    return Layers(hidden_states, tuple(outputs.attentions or ()), watch.take() if watch else {})


def allowed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return which tokens (batch, query, key) may look at which: none ahead, in another document, or padding."""
    ids = batch["input_ids"]
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None]
    if "position_ids" in batch:
        document = (batch["position_ids"] == 0).cumsum(-1)
        mask = mask & (document[:, :, None] == document[:, None, :])
    if "attention_mask" in batch:
        is_token = batch["attention_mask"].bool()
        mask = mask & is_token[:, None, :] & is_token[:, :, None]
    return mask.expand(len(ids), length, length)


def target_batches(
    teacher: Teacher, batch: dict[str, torch.Tensor], width: int, tokens: int
) -> Iterator[torch.Tensor]:
    """Yield the logits of all learned positions of a batch in order, a few tokens at a time, each (some, width)."""
    states = taken(teacher(batch)[0], places(batch["labels"]))
    for start in range(0, len(states), tokens):
        yield teacher.logits(states[start : start + tokens], width)
