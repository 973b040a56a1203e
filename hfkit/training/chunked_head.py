"""The head of a language model and the losses on its logits, a chunk of tokens at a time.

The logits of a batch are the largest tensor of a small model by far, and a distillation holds several of that size.
Here (tokens, vocabulary) never exists whole, and yet the matrix product of the head is done only once.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Sums = tuple[Tensor, Tensor]  # the loss to learn (), and what to log beside it (parts,)
Losses = Callable[..., Sums]
Rows = Callable[[slice], tuple[Tensor, ...]]


@torch.compiler.disable
def chunked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, losses: Losses, rows: Rows, chunk: int, compiled: bool = False
) -> Sums:
    """Return the sums over the tokens of losses on the logits hidden @ weight.T + bias.

    The gradient of a chunk is taken as soon as its loss is known, so that the backward pass only multiplies the
    gradients of hidden, weight and bias by that of the loss. The matrix products are done in the dtype of autocast,
    or else in that of hidden; the gradient of the weight is added up in float32. Losses should be plain sums, to be
    divided by the number of tokens afterwards: then no gradient is so small that it vanishes in float16.

    Args:
        hidden: (tokens, hidden).
        weight: (vocabulary, hidden), whole: call this in the forward pass of the module that owns it.
        bias: (vocabulary,), if the head has one.
        losses: takes the logits of a chunk (chunk, vocabulary), in the dtype of the product, and the chunk's rows;
            returns the loss to learn and what to log beside it, all of them sums over the chunk. Only the logits get a
            gradient.
        rows: makes the further arguments of `losses` for a slice of the tokens: targets, logits of a teacher. It is
            not compiled.
        chunk: tokens of a chunk, see `chunk_tokens`. The last one has what is left.
        compiled: whether to compile `losses` with its gradient. That is done again for a chunk of another size, then
            for all sizes, and whenever a number changes that `losses` reads (one that varies belongs in `rows`).

    Returns:
        The loss (), and the parts (parts,), which pass no gradient on.
    """
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ):
        return _ChunkedHead.apply(hidden, weight, bias, losses, rows, chunk, compiled)
    weight, bias = _cast(weight, hidden), _cast(bias, hidden)
    return _total(
        [
            losses(functional.linear(_cast(hidden[part], hidden), weight, bias), *rows(part))
            for part in _chunks(hidden, chunk)
        ]
    )


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return how many tokens to take at a time: the power of two whose logits fill a budget in float32, within bounds.

    A chunk is there several times over: as logits, as their gradient and, where it is not compiled, as log-softmax and
    the like. The 16 MiB of a CPU stay within its last cache, or at least in memory that the process need not ask for
    again, so that chunks are faster than all tokens at once. A GPU has 1 GiB to spare. Each chunk also reads and
    writes the gradient of the whole weight (vocabulary, hidden): with too few tokens that takes as long as the matrix
    products.
    """
    budget, fewest = (2**24, 128) if device.type == "cpu" else (2**30, 1024)  # bytes, tokens
    tokens = budget // (4 * vocabulary)
    return max(fewest, 2 ** (tokens.bit_length() - 1) if tokens else 0)


class _ChunkedHead(torch.autograd.Function):
    """Computes its gradients, up to a factor, in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        losses: Losses,
        rows: Rows,
        chunk: int,
        compiled: bool,
    ) -> Sums:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wide = torch.promote_types(weight.dtype, torch.float32)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        bias_gradient = weight.new_zeros(len(weight), dtype=wide) if needs_bias else None

        cast_weight, cast_bias = _cast(weight, hidden), _cast(bias, hidden)
        sums = []
        for part in _chunks(hidden, chunk):
            states = _cast(hidden[part], hidden)
            logits = functional.linear(states, cast_weight, cast_bias)  # (chunk, vocabulary), as its gradient
            # Sizes 0 and 1 are special to the compiler; for them it would begin again.
            step = _compiled_with_gradient() if compiled and len(logits) > 1 else _with_gradient
            gradient, chunk_sums = step(losses, logits, *rows(part))
            sums.append(chunk_sums)
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ cast_weight
            if weight_gradient is not None:
                _add_product(weight_gradient, gradient.T, states)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0, dtype=wide)

        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        loss, parts = _total(sums)
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd casts them to the dtypes of their tensors.
        gradients = (None if tensor is None else tensor * gradient for tensor in ctx.saved_tensors)
        return (*gradients, None, None, None, None)


def _with_gradient(losses: Losses, logits: Tensor, *rows: Tensor) -> tuple[Tensor, Sums]:
    """Return the gradient of the logits, and the sums."""
    return torch.func.grad_and_value(losses, has_aux=True)(logits, *rows)


@lru_cache
def _compiled_with_gradient() -> Callable[..., tuple[Tensor, Sums]]:
    return torch.compile(_with_gradient)


def _chunks(hidden: Tensor, chunk: int) -> Iterator[slice]:
    """Yield slices of the tokens. One, an empty one, where there are none: so the sums are made all the same."""
    yield from (slice(start, start + chunk) for start in range(0, max(len(hidden), 1), chunk))


def _cast(tensor: Any, hidden: Tensor) -> Any:
    """Return a tensor, or None, in the dtype in which the head is to multiply."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return tensor if tensor is None else tensor.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total of the same or a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _total(sums: list[Sums]) -> Sums:
    losses, parts = zip(*sums, strict=True)
    return torch.stack(losses).sum(), torch.stack(parts).sum(0)
