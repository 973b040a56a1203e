"""A micro-step asks no tensor for a value: on a GPU that would wait until all that was asked of it before is done."""

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfkit import cli
from hfkit.data.rows.learned import places, taken
from hfkit.training.resumable import ResumableTrainer
from tests.test_distill import KL, RECIPE, recipe  # noqa: F401 a fixture

RUNS = {
    "pretrain": ["recipes/pretrain.yaml"],
    "finetune": ["recipes/finetune.yaml"],
    "not packed": ["recipes/finetune.yaml", "packing=false"],
    "classify": ["recipes/classify.yaml"],
    "distill": [RECIPE],
    "cached": [RECIPE, KL, "targets={source: cached, k: 8}"],
}
# transformers looks whether a mask is needed at all, where the model is not compiled.
ALLOWED = ("masking_utils.py",)


class Reads(TorchDispatchMode):
    """Notes the operations that need a value, or whose result has a size that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        by_mask = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if by_mask or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"):
            frames = traceback.extract_stack()
            if not any(frame.filename.endswith(ALLOWED) for frame in frames):
                asking = [frame for frame in frames[:-1] if "/torch/" not in frame.filename][-1]
                self.found.append(f"{name} at {asking.filename}:{asking.lineno}")
        return function(*args, **(kwargs or {}))


@contextmanager
def every_micro_step(monkeypatch: pytest.MonkeyPatch, watched: Callable[[], Any]) -> Iterator[list[int]]:
    """Micro-steps run in a context of their own; gives a list with an entry for each."""
    plain, steps = ResumableTrainer.training_step, list[int]()

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        with watched():
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "training_step", step)
    yield steps


@pytest.mark.parametrize("name", RUNS)
def test_no_micro_step_asks_for_a_value(recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # noqa: F811
    reads = Reads()
    with every_micro_step(monkeypatch, lambda: reads) as steps:
        assert cli.main(["run", *RUNS[name], "output_dir=runs/watched"]) == 0
    assert steps and reads.found == []


def test_a_read_is_noted() -> None:
    """The check itself: a mask as index, and a value that is asked for."""
    with Reads() as reads:
        torch.ones(3)[torch.tensor([True, False, True])]
        torch.ones(1).item()
    names, places_of = zip(*(each.split(" at ") for each in reads.found), strict=True)
    assert names == ("aten::index", "aten::_local_scalar_dense")
    assert all(Path(__file__).name in each for each in places_of)


def test_places_are_those_whose_next_token_is_learned() -> None:
    labels = torch.tensor([[-100, 5, -100, 7], [1, -100, -100, 2]])
    at = places(labels)
    assert at.tolist() == [0, 2, 6]
    assert labels.flatten()[at + 1].tolist() == [5, 7, 2]
    states = torch.randn(2, 4, 3)
    assert torch.equal(taken(states, at), states[:, :-1][labels[:, 1:] != -100])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", RUNS)
def test_a_gpu_is_not_waited_for(recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # noqa: F811
    """As torch itself counts it. A forward pass of an uncompiled model has the one look at its mask."""
    counts: list[int] = []

    @contextmanager
    def counted() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(each.message) for each in told))

    with every_micro_step(monkeypatch, counted):
        assert cli.main(["run", *RUNS[name], "output_dir=runs/watched"]) == 0
    passes = 2 if name == "distill" else 1  # the teacher's is one too
    assert counts[1:] and max(counts[1:]) <= 2 * passes  # the first sets things up; of a mask up to two looks
