"""benchmarks/gpu.py, which otherwise runs on a GPU only: every part at toy size, and going on where a call ended."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hfkit.planning.machines import TABLE, published

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
SKIPPED = {
    "hfkit, flex_attention, documents masked": "flex_attention has no gradients on a CPU",
    "hfkit, flash_attention_2, documents masked": "flash_attn is not installed",
    "trl GKD": "trl is not installed",
    "Liger": "Liger's kernels need a GPU",
}


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))


def test_every_part_runs_at_toy_size(gpu: Any, tmp_path: Path) -> None:
    """So that the first run on a GPU does not fail on a typo; what is left out says why."""
    assert gpu.main(["--out", str(tmp_path), "--toy", "--here"]) == 0
    skipped = {}
    for part in gpu.PARTS:
        found = kept(tmp_path, part)
        assert found["is_done"] and found["result"] and found["machine"]["torch"]
        for name, piece in found["result"].items():
            assert "failed" not in piece, piece["failed"]
            assert piece["card"] and piece["seconds"] >= 0
            skipped |= {name: piece["skipped"]} if "skipped" in piece else {}
    assert skipped.items() <= SKIPPED.items() and skipped["Liger"]


def part_of(*names: str, calls: list[str], fails: tuple[str, ...] = ()) -> Callable[[Any], Iterator[Any]]:
    """A part whose pieces note that they were measured; some of them fail."""

    def work(name: str) -> dict[str, Any]:
        calls.append(name)
        if name in fails:
            raise ValueError("no such card")
        return {}

    return lambda size: ((name, lambda name=name: work(name)) for name in names)


def test_pieces_that_are_there_are_skipped_and_those_that_fail_are_kept(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(gpu, "PARTS", {"part": (part_of("a", "b", "c", calls=calls, fails=("b",)), 1)})
    keys = ["--out", str(tmp_path), "--here"]
    assert gpu.main(keys) == 0 and calls == ["a", "b", "c"]
    told = kept(tmp_path, "part")["result"]["b"]["failed"]
    assert "ValueError: no such card" in told and "Traceback" in told
    assert gpu.main(keys) == 0 and calls == ["a", "b", "c"]
    assert gpu.main([*keys, "--retry"]) == 0 and calls == ["a", "b", "c", "b"]


def test_a_part_that_cannot_begin_is_a_failure(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(size: Any) -> Iterator[Any]:
        yield from ()
        raise ImportError("no module")

    monkeypatch.setattr(gpu, "PARTS", {"part": (pieces, 1)})
    assert gpu.main(["--out", str(tmp_path), "--here"]) == 0
    assert "ImportError" in kept(tmp_path, "part")["result"]["part"]["failed"]


def test_what_does_not_fit_into_the_budget_is_left_to_the_next_call(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    parts = {name: (part_of(f"{name}1", f"{name}2", calls=calls), 100) for name in "ab"}
    monkeypatch.setattr(gpu, "PARTS", parts)
    keys = ["--out", str(tmp_path), "--here", "--budget", "10"]
    for count, code in ((1, 75), (2, 75), (3, 75), (4, 0)):  # each call has room for its first piece alone
        assert gpu.main(keys) == code and len(calls) == count
    assert calls == ["a1", "a2", "b1", "b2"]
    assert "a, b: left to the next call" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "done_before", "ends", "told"),
    [
        (None, 0, 75, "took more than the 540 s of a whole call"),  # it would be begun for ever
        (None, 1, 75, None),  # the next call gives it the whole budget
        (-9, 1, 0, "its process ended with -9"),  # and the others go on
    ],
)
def test_a_piece_that_is_cut_or_ends_its_process(
    gpu: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int | None,
    done_before: int,
    ends: int,
    told: str | None,
) -> None:
    codes = [code, 0]

    def child(command: list[str], seconds: float) -> int | None:
        record = gpu.Record(tmp_path, "part")
        ended = codes.pop(0)
        record.pieces.update({f"{number}": {} for number in range(done_before)})
        record.keep(running="slow" if ended != 0 else None, is_done=ended == 0)
        return ended

    monkeypatch.setattr(gpu, "child", child)
    monkeypatch.setattr(gpu, "PARTS", {"part": (None, 1)})
    assert gpu.main(["--out", str(tmp_path)]) == ends
    assert kept(tmp_path, "part")["result"].get("slow", {}).get("failed") == told


def test_what_takes_too_long_is_ended_with_all_that_it_started(gpu: Any, tmp_path: Path) -> None:
    """Or it would go on beside the next piece."""
    alive = tmp_path / "alive"
    inner = f"import pathlib, time\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert gpu.child([sys.executable, "-c", outer], 3) is None
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()
    assert gpu.child([sys.executable, "-c", "raise SystemExit(7)"], 60) == 7


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T400", None),
    ],
)
def test_a_card_is_known_by_the_name_that_torch_gives_it(name: str, known: str | None) -> None:
    assert published(name) == (TABLE[known] if known else None)
