"""The head in chunks: the same numbers as with all logits at once, and never all logits at once."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hfkit.distillation import losses
from hfkit.training.chunked_head import chunk_tokens, chunked_head

TOKENS, HIDDEN, VOCABULARY = 23, 8, 31


class World:
    """A head with all that its losses need."""

    def __init__(self, dtype: torch.dtype = torch.float64, tokens: int = TOKENS, has_bias: bool = True):
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, HIDDEN, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if has_bias else None
        self.targets = torch.randint(VOCABULARY, (tokens,))
        self.teacher = torch.randn(tokens, VOCABULARY, dtype=dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [each for each in (self.hidden, self.weight, self.bias) if each is not None]

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        return self.targets[part], self.teacher[part]

    def dense(self) -> tuple[Tensor, Tensor]:
        return sums(functional.linear(self.hidden, self.weight, self.bias), self.targets, self.teacher)

    def chunked(self, chunk: int, compiled: bool = False) -> tuple[Tensor, Tensor]:
        return chunked_head(self.hidden, self.weight, self.bias, sums, self.rows, chunk, compiled)


def sums(logits: Tensor, targets: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    entropy = losses.cross_entropy(logits, targets).sum()
    divergence = losses.forward_kl(logits, teacher, 2.0).sum()
    return 0.3 * entropy + 0.7 * divergence, torch.stack([entropy, divergence])


def gradients(world: World, loss: Tensor) -> list[Tensor]:
    """Of a loss that is divided by its tokens, as a trainer does."""
    return list(torch.autograd.grad(loss / 7, world.tensors))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 8, 22, 23, 100])
def test_equals_all_logits_at_once(chunk: int, has_bias: bool) -> None:
    world = World(has_bias=has_bias)
    found, expected = world.chunked(chunk), world.dense()
    torch.testing.assert_close(found, expected)
    assert not found[1].requires_grad
    torch.testing.assert_close(gradients(world, found[0]), gradients(world, expected[0]))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_equals_too() -> None:
    """A last chunk of another size compiles it for all sizes; then nothing does again."""
    for chunk in (5, 7, 23):
        world = World()
        found, expected = world.chunked(chunk, compiled=True), world.dense()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(world, found[0]), gradients(world, expected[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        World().chunked(9, compiled=True)
        World(tokens=1).chunked(9, compiled=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_tokens_give_zeros(compiled: bool) -> None:
    world = World(tokens=0)
    loss, parts = world.chunked(8, compiled)
    assert loss == 0 and parts.shape == (2,) and not parts.any()
    found = gradients(world, loss)
    assert [each.shape for each in found] == [each.shape for each in world.tensors]
    assert not any(each.any() for each in found)


def test_only_what_is_trained_gets_a_gradient() -> None:
    """A frozen head under LoRA; a frozen body under a head."""
    expected = World()
    expected.dense()[0].backward()
    for trained in ("hidden", "weight", "bias"):
        world = World()
        for each in world.tensors:
            each.requires_grad_(False)
        getattr(world, trained).requires_grad_()
        world.chunked(6)[0].backward()
        torch.testing.assert_close(getattr(world, trained).grad, getattr(expected, trained).grad)
        assert sum(each.grad is not None for each in world.tensors) == 1


def test_without_gradients_only_the_values_are_made() -> None:
    world = World()
    with torch.no_grad(), Largest() as largest:
        found = world.chunked(6)
    assert not found[0].requires_grad
    torch.testing.assert_close(found, tuple(each.detach() for each in world.dense()))
    assert not any("backward" in name for name in largest.names)
    for each in world.tensors:
        each.requires_grad_(False)
    assert not world.chunked(6)[0].requires_grad


def test_under_autocast_it_is_as_close_as_all_at_once() -> None:
    """Weights in float32, products in bfloat16: the gradients are off by no more than those of all logits at once."""
    world, exact = World(torch.float32), World()
    for each, wide in zip(world.tensors, exact.tensors, strict=True):
        wide.data = each.detach().double()
    exact.targets, exact.teacher = world.targets, world.teacher.double()
    with torch.autocast("cpu", torch.bfloat16):
        found, dense = world.chunked(6), world.dense()
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-4)
    expected = gradients(exact, exact.dense()[0])
    for ours, theirs, true in zip(gradients(world, found[0]), gradients(world, dense[0]), expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - true).norm() < 1.2 * (theirs - true).norm() < 0.02 * true.norm()


def test_a_weight_in_bfloat16_is_added_up_in_float32() -> None:
    """Many small contributions to one large: in bfloat16 they would be lost."""
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.tensor([[256.0]] + [[0.5]] * 256, dtype=torch.bfloat16)

    def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.float().sum(), logits.float().sum()[None]

    chunked_head(hidden, weight, None, plain, lambda part: (), 1)[0].backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16 and weight.grad.item() == 384.0


class Largest(TorchDispatchMode):
    """The operations that were done, and how many elements their largest result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for each in results if isinstance(results, tuple | list) else [results]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        self.names.add(str(func))
        return results


def test_the_logits_of_all_tokens_never_exist() -> None:
    tokens, chunk = 400, 16  # so many that a chunk's logits are the largest tensor
    world = World(tokens=tokens)
    teacher_head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)

    def rows(part: slice) -> tuple[Tensor, Tensor]:
        return world.targets[part], world.hidden[part].detach() @ teacher_head.T

    del world.teacher
    with Largest() as largest:
        loss, _ = chunked_head(world.hidden, world.weight, world.bias, sums, rows, chunk)
        loss.backward()
    assert largest.numel == max(tokens * HIDDEN, chunk * VOCABULARY) < tokens * VOCABULARY / 3
    with Largest() as largest:
        logits = functional.linear(world.hidden, world.weight, world.bias)
        sums(logits, *rows(slice(None)))[0].backward()
    assert largest.numel == tokens * VOCABULARY  # so the measurement can fail


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, chunk: int | None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.chunk = chunk

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        if self.chunk is None:
            return entropy(functional.linear(hidden, self.embedding.weight), targets)[0]
        return chunked_head(hidden, self.embedding.weight, None, entropy, lambda part: (targets[part],), self.chunk)[0]


def entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses.cross_entropy(logits, targets).sum()
    return loss, loss[None]


def train(model: Callable[..., Tensor], scaler: torch.amp.GradScaler | None = None, autocast: bool = False) -> None:
    """A step of three micro-batches of unequal size, from its gradients on."""
    generator = torch.Generator().manual_seed(1)
    for size in (9, 4, 12):
        ids, targets = (torch.randint(VOCABULARY, (size,), generator=generator) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, targets) / 25
        (loss if scaler is None else scaler.scale(loss)).backward()


def close(model: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and theirs.grad.any()
        assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_tied_weights_and_accumulation_add_up(autocast: bool) -> None:
    chunked, dense = Tied(5), Tied(None)
    train(chunked, autocast=autocast)
    train(dense, autocast=autocast)
    close(chunked, dense, 1e-2 if autocast else 1e-5)


def test_a_scaled_loss_scales_the_gradients() -> None:
    chunked, dense = Tied(5), Tied(None)
    optimizer, scaler = torch.optim.SGD(chunked.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    train(chunked, scaler)
    train(dense)
    assert chunked.body.weight.grad is not None and dense.body.weight.grad is not None
    assert chunked.body.weight.grad.norm() > 1000 * dense.body.weight.grad.norm()
    scaler.unscale_(optimizer)
    close(chunked, dense)


def test_a_compiled_model_may_call_it() -> None:
    chunked, dense = Tied(5), Tied(None)
    train(torch.compile(chunked, backend="aot_eager"))
    train(dense)
    close(chunked, dense)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_reduces_its_gradients(process_group: None) -> None:
    """Each parameter is reduced once a step, also where it is both embedding and head."""
    chunked, dense = Tied(5), Tied(None)
    parallel = nn.parallel.DistributedDataParallel(chunked)
    reduced: list[int] = []

    def hook(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(sum(each.numel() for each in bucket.parameters()))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, hook)
    ids, targets = torch.arange(20), torch.arange(20).flip(0)
    (parallel(ids, targets) / 20).backward()
    (dense(ids, targets) / 20).backward()
    close(chunked, dense)
    assert sum(reduced) == sum(each.numel() for each in chunked.parameters())


def test_its_gradient_has_no_gradient_of_its_own() -> None:
    world = World()
    (gradient,) = torch.autograd.grad(world.chunked(5)[0] ** 2, world.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_chunks_fill_their_budget() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for vocabulary in (2, 320, 8192, 50257, 151936, 10**9):
        for device, budget, fewest in ((cpu, 2**24, 128), (gpu, 2**30, 1024)):
            tokens = chunk_tokens(vocabulary, device)
            assert tokens & (tokens - 1) == 0 and tokens >= fewest
            assert tokens == fewest or budget / 2 < tokens * vocabulary * 4 <= budget
