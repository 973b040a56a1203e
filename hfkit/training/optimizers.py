"""Optimizers that Trainer does not have."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

CLASS_HEADS = ("score", "classifier")
MUCH_FASTER = 1.5


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon/): momentum, orthogonalized.

    The update is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (arXiv 2502.16982): a step has the
    size of AdamW's, so that both can share a learning rate and a weight decay. Matrices of one shape are
    orthogonalized in one batch: on a CPU in a fraction of the time that they take one by one, on a GPU in fewer
    launches.

    Args:
        params: matrices (out, in), or groups of them. FSDP2's shards are gathered, one matrix each, for the step.
        dtype: precision of the orthogonalization.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same_shape = defaultdict[tuple[int, ...], list[torch.Tensor]](list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[tuple(parameter.shape)].append(parameter)
            for parameters in same_shape.values():
                self._step(parameters, group["lr"], group["weight_decay"], group["momentum"])

    def _step(self, parameters: list[torch.Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        """Update matrices of one shape."""
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        buffers = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov
        whole = orthogonalize(torch.stack([_whole(update.to(self.dtype)) for update in updates]))
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        size = 0.2 * max(parameters[0].shape) ** 0.5
        steps = [_like(direction, parameter) for direction, parameter in zip(whole.unbind(), parameters, strict=True)]
        torch._foreach_add_(parameters, steps, alpha=-lr * size)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return the nearest (semi-)orthogonal matrices, roughly: singular values end between 0.7 and 1.2.

    The quintic Newton-Schulz iteration of Muon; its coefficients are the steepest at zero that still converge.

    Args:
        matrices: (matrices, rows, columns), in the precision to compute in.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)  # (matrices, rows, rows), of the shorter side
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if is_tall else x


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix that FSDP2 shards, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a whole matrix that every process has, in the dtype of a parameter and sharded like it."""
    tensor = tensor.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def fastest_orthogonalization(model: nn.Module, device: torch.device) -> str:
    """Return the precision in which this machine orthogonalizes the matrices of a model fastest: `fp32` or `bf16`.

    It is bf16 only where that is much faster, so that runs on a busy machine agree. A GPU is not asked. Of processors
    some have bfloat16 instructions and are slower with them, and others emulate them at a hundredth of the speed.
    """
    if device.type != "cpu":
        return "bf16"
    kinds = kinds_of(model)
    counts = Counter(tuple(parameter.shape) for name, parameter in model.named_parameters() if kinds[name] == "matrix")
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        # A few of each shape tell, and large models have many.
        batches = [torch.randn(min(count, 4), *shape).to(dtype) for shape, count in counts.items()]
        seconds[name] = min(_seconds(batches) for _ in range(5))
    return "bf16" if seconds["bf16"] * MUCH_FASTER < seconds["fp32"] else "fp32"


def _seconds(batches: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    for batch in batches:
        orthogonalize(batch)
    return time.perf_counter() - start


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices and AdamW for embeddings, head and vectors, as one optimizer.

    Args:
        muon_group: the parameter group of `Muon`.
        adamw_groups: parameter groups of AdamW.
        muon_kwargs, adamw_kwargs: further arguments of `Muon` and `torch.optim.AdamW`.
    """

    def __init__(
        self,
        muon_group: dict[str, Any],
        adamw_groups: list[dict[str, Any]],
        muon_kwargs: dict[str, Any],
        adamw_kwargs: dict[str, Any],
    ):
        self.muon = Muon([muon_group], **muon_kwargs)
        self.adamw = torch.optim.AdamW(adamw_groups, **adamw_kwargs)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._share()

    def _share(self) -> None:
        """Let the two work on the groups and the state of this one."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.state = defaultdict(dict, self.state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Return the kind of each parameter, by its name: `embedding`, `head`, `matrix` (a hidden one, which Muon takes)
    or `vector`.

    A matrix that is embedding and head in one is an embedding.
    """
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [name for name, module in model.named_modules() if module is output]
    heads += [name for name, _ in model.named_modules() if name.rpartition(".")[2] in CLASS_HEADS]

    def kind(name: str, parameter: nn.Parameter) -> str:
        if parameter.ndim != 2:
            return "vector"
        for of_kind, modules in (("embedding", embeddings), ("head", heads)):
            # An adapter's matrices lie beside the layer that they adapt.
            if any(name.startswith(f"{module.removesuffix('.base_layer')}.") for module in modules):
                return of_kind
        return "matrix"

    return {name: kind(name, parameter) for name, parameter in model.named_parameters()}
