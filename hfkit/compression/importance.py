"""How much the parts of a model count, by what they do on some text: channels and heads, and whole layers.

Rows are token ids (rows, length), without padding. All sums are in float32.
"""

from math import pi
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from hfkit.errors import HfkitError
from hfkit.model.heads import decoder_of
from hfkit.model.slicing import WIDTH_MODELS, Importance, layers_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def activation_importance(model: "PreTrainedModel", rows: Tensor, batch_size: int = 8) -> Importance:
    """Return the importance of channels by the root of the sum of the squares of their activations on the rows.

    - A channel of the residual stream: what all norms give in it.
    - A channel of the MLP: what down_proj reads in it.
    - A query head: what o_proj reads of it.

    Source: Minitron (Muralidharan et al., 2024, arXiv 2407.14679), which takes means of absolute values over the
    tokens of a row. On four small models the losses after slicing were higher on average with those, and also where
    activations were multiplied by the norms of the weights that read them.

    Raises:
        HfkitError: if it is not one of the `WIDTH_MODELS`.
    """
    if model.config.model_type not in WIDTH_MODELS:
        what = f"a model of type {model.config.model_type} cannot be made narrower, only {', '.join(WIDTH_MODELS)}"
        raise HfkitError(f"importance: {what}; drop layers instead")
    base, heads = model.base_model, model.config.num_attention_heads
    norms = [base.norm]
    for layer in base.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    squares = dict[nn.Module, Tensor]()  # summed over tokens, of each norm's outputs and each projection's inputs

    def add(module: nn.Module, activations: Tensor) -> None:
        squares[module] = squares.get(module, 0) + activations.float().square().sum((0, 1))

    hooks = [norm.register_forward_hook(lambda module, _, outputs: add(module, outputs)) for norm in norms]
    for layer in base.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            hooks.append(projection.register_forward_pre_hook(lambda module, args: add(module, args[0])))
    for batch in rows.split(batch_size):
        _run(model, batch)
    for hook in hooks:
        hook.remove()
    return Importance(
        hidden=torch.stack([squares[norm] for norm in norms]).sum(0).sqrt(),
        intermediate=[squares[layer.mlp.down_proj].sqrt() for layer in base.layers],
        heads=[squares[layer.self_attn.o_proj].view(heads, -1).sum(1).sqrt() for layer in base.layers],
    )


@torch.no_grad()
def layers_to_drop(
    model: "PreTrainedModel",
    rows: Tensor,
    count: int,
    by: Literal["block_influence", "angular_distance"],
    batch_size: int = 8,
) -> list[int]:
    """Return the indices, ascending, of the layers that change the residual stream least; of equal ones the first.

    - `block_influence`: the `count` layers with the least 1 - cos of input and output (ShortGPT, Men et al., 2024,
      arXiv 2403.03853).
    - `angular_distance`: the `count` layers behind one another with the least arccos(cos) / pi of the first's input
      and the last's output (Gromov et al., 2024, arXiv 2403.17887, of the last token of each row alone; here of all).

    Both are taken over all tokens.

    Raises:
        HfkitError: if `count` is not from 1 to one less than the model's layers.
    """
    depth = model.config.num_hidden_layers
    if not 1 <= count < depth:
        raise HfkitError(
            f"layers: from 1 to {depth - 1} of the model's {depth} can be dropped, got {count}; change it"
        )
    span = 1 if by == "block_influence" else count
    changes = torch.zeros(depth - span + 1, device=model.device)  # of the spans of layers that begin at each
    for batch in rows.split(batch_size):
        stream = _stream(model, batch)
        pairs = zip(stream[:-span], stream[span:], strict=True)
        cosines = torch.stack([cosine_similarity(before, after, dim=-1) for before, after in pairs])
        change = 1 - cosines if by == "block_influence" else cosines.clamp(-1, 1).arccos() / pi
        changes += change.sum((1, 2))  # (spans, rows, length) -> (spans,)
    order = changes.argsort(stable=True).tolist()
    return sorted(order[:count]) if by == "block_influence" else list(range(order[0], order[0] + count))


def _stream(model: "PreTrainedModel", batch: Tensor) -> list[Tensor]:
    """Return the inputs of all layers and the output of the last, (rows, length, hidden) in float32."""
    stream = list[Tensor]()
    layers = model.get_submodule(layers_name(model))
    hooks = [layer.register_forward_pre_hook(lambda _, args: stream.append(args[0].float())) for layer in layers]

    def note_last(_: nn.Module, args: tuple, outputs: Tensor | tuple) -> None:
        stream.append((outputs[0] if isinstance(outputs, tuple) else outputs).float())

    hooks.append(layers[-1].register_forward_hook(note_last))
    _run(model, batch)
    for hook in hooks:
        hook.remove()
    return stream


def _run(model: "PreTrainedModel", batch: Tensor) -> None:
    was_training = model.training
    model.eval()
    decoder_of(model)(input_ids=batch.to(model.device), use_cache=False)
    model.train(was_training)
