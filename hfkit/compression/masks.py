"""Which weights of a matrix are set to zero, as functions of tensors without state.

A matrix is (outputs, inputs), as of `nn.Linear`, with whatever strides. All compute in float32, whatever the dtype of
the weights. Of weights that count alike the first are kept.
"""

import re
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from hfkit.errors import HfkitError, shown


class Sparsity(NamedTuple):
    """The share of zeros in a matrix, or in each group of so many consecutive inputs of an output."""

    share: Fraction  # exact: as a float, 0.29 of 100 would be 28
    group: int | None = None

    def zeros(self, size: int) -> int:
        """Return how many of so many weights become zero: floor(share * size)."""
        return int(self.share * size)


def parse_sparsity(value: float | str) -> Sparsity:
    """Parse a share such as 0.5, or N:M such as "2:4": of each M consecutive inputs of an output N keep a weight.

    Source of N:M: Zhou et al., 2021, arXiv 2102.04010.

    Raises:
        HfkitError: if it is neither, or leaves nothing or everything.
    """
    if pattern := re.fullmatch(r"(\d+):(\d+)", str(value)):
        nonzero, group = int(pattern[1]), int(pattern[2])
        if 0 < nonzero < group:
            return Sparsity(Fraction(group - nonzero, group), group)
    else:
        try:
            share = Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if 0 < share < 1:
            return Sparsity(share)
    rule = "must be a share between 0 and 1, or N:M with N from 1 to M - 1"
    raise HfkitError(f"sparsity: {rule}, got {shown(value)}; write 0.5 or 2:4")


def magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """Keep the weights of the largest absolute values, in the whole matrix or in each group.

    Source: Han et al., 2015, arXiv 1506.02626.

    Returns:
        Whether a weight is kept, bool (outputs, inputs).
    """
    scores = weight.detach().float().abs()
    return _best(scores if sparsity.group else scores.reshape(1, -1), sparsity).view_as(weight)


def wanda(weight: Tensor, input_norms: Tensor, sparsity: Sparsity) -> Tensor:
    """Keep the weights of the largest |w_ij| ||x_j||, in each output's row or in each group.

    Source: Sun et al., 2023, arXiv 2306.11695.

    Args:
        input_norms: the norm of each input over all tokens, (inputs,).

    Returns:
        Whether a weight is kept, bool (outputs, inputs): floor(share * inputs) zeros in every row.
    """
    return _best(weight.detach().float().abs() * input_norms.float(), sparsity)


def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: Sparsity, block_size: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Zero those weights whose loss changes the output least, and let the others make up for them.

    With H = X^T X and its damped inverse H^-1 = U^T U, U upper triangular, zeroing w_ij costs w_ij^2 / U_jj^2. Column
    after column what was lost is spread over the columns behind it. Which weights go is decided for a block of columns
    (or a group of N:M) once all columns before it are done. A weight of a dead input, which was never other than 0,
    costs nothing.

    Source: Frantar and Alistarh, 2023, arXiv 2301.00774.

    Args:
        gram: X^T X of the inputs X (tokens, inputs): (inputs, inputs).
        block_size: columns that share one decision; a multiple of the group of N:M, or made one.
        damping: what is added to the diagonal of H, in parts of its mean. Ten times more, and so on, where H has no
            Cholesky factor.

    Returns:
        The new weight in its dtype, with zeros, and whether a weight is kept, bool, both (outputs, inputs).

    Raises:
        HfkitError: if no damping helps.
    """
    outputs, inputs = weight.shape
    _check_groups(inputs, sparsity)
    step = sparsity.group or block_size  # columns that are decided at once
    block_size = -(-block_size // step) * step
    new = weight.detach().float().clone(memory_format=torch.contiguous_format)
    mask = torch.ones_like(new, dtype=torch.bool)
    upper = _inverse_factor(gram.float(), damping)
    diagonal, is_alive = upper.diagonal(), gram.diagonal() > 0
    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        lost = torch.zeros_like(new[:, start:end])  # in units of the diagonal
        for column in range(start, end):
            if column % step == 0:
                these = slice(column, min(column + step, end))
                costs = (new[:, these] / diagonal[these]).square() * is_alive[these]
                if sparsity.group:
                    mask[:, these] = _largest(costs, sparsity.zeros(step))
                else:  # rounded in such a way that all columns so far have floor(share * size) zeros
                    zeros = sparsity.zeros(outputs * end) - sparsity.zeros(outputs * start)
                    mask[:, these] = _largest(costs.view(1, -1), zeros).view_as(costs)
            lost[:, column - start] = new[:, column] * ~mask[:, column] / diagonal[column]
            new[:, column:end] -= lost[:, column - start, None] * upper[column, column:end]
        new[:, end:] -= lost @ upper[start:end, end:]
    return (new * mask).to(weight.dtype), mask


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with U^T U = (H + damping)^-1.

    H read backwards has the factor L L^T; L read backwards is R, upper triangular, with H = R R^T; so U = R^-1. H is
    never inverted.
    """
    identity = torch.eye(len(hessian), device=hessian.device)
    mean = hessian.diagonal().mean()
    scale = torch.where(mean > 0, mean, 1.0)  # 0: all inputs are dead
    for power in range(5):
        damped = hessian + damping * 10**power * scale * identity
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        if info == 0 and upper.isfinite().all():
            return upper
    raise HfkitError(
        f"method: sparsegpt finds no Cholesky factor of a matrix's inputs, even with damping={damping * 10**4:g}; "
        f"see whether the model's weights are finite, or use wanda"
    )


def _best(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Return whether a score is among those kept of its row, or of its group."""
    _check_groups(scores.shape[1], sparsity)
    sets = scores.reshape(-1, sparsity.group or scores.shape[1])
    return _largest(sets, sparsity.zeros(sets.shape[1])).view_as(scores)


def _check_groups(inputs: int, sparsity: Sparsity) -> None:
    if sparsity.group and inputs % sparsity.group:
        pattern = f"{sparsity.group - sparsity.zeros(sparsity.group)}:{sparsity.group}"
        rule = f"{pattern} needs matrices whose inputs are a multiple of {sparsity.group}"
        raise HfkitError(f"sparsity: {rule}, and one has {inputs}; use a share such as 0.5")


def _largest(scores: Tensor, zeros: int) -> Tensor:
    """Return whether a score is among all but the `zeros` smallest of its row, of equal ones the first: (rows,
    scores)."""
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(zeros, dim=1, keepdim=True).values  # far less work than to sort
    above, at = scores > threshold, scores == threshold
    ties = scores.shape[1] - zeros - above.sum(1, keepdim=True)
    return above | (at & (at.cumsum(1) <= ties))
