"""The matrices of a model: linear maps, of whatever class, seen alike.

GPT-2 and its kin have `Conv1D` in place of `nn.Linear`: the same map, whose weight is (inputs, outputs).
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

MATRICES = (nn.Linear, Conv1D)


def matrices_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear maps in a module, by name."""
    return {name: submodule for name, submodule in module.named_modules() if isinstance(submodule, MATRICES)}


def weight_of(matrix: nn.Module) -> torch.Tensor:
    """Return the weight as (outputs, inputs): the parameter itself, or a view of it."""
    return matrix.weight.T if isinstance(matrix, Conv1D) else matrix.weight  # type: ignore[return-value]


def as_conv1d(linear: nn.Module) -> Conv1D:
    """Return the same map as a `Conv1D`, which has a bias always."""
    weight = weight_of(linear)  # (outputs, inputs)
    conv = Conv1D(*weight.shape).to(weight)
    conv.weight = nn.Parameter(weight.detach().T.contiguous())
    if linear.bias is not None:
        conv.bias = nn.Parameter(linear.bias.detach())  # type: ignore[arg-type]
    return conv
