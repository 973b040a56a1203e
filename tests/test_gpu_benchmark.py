"""benchmarks/gpu.py, which otherwise runs on a GPU only: every part at toy size."""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hfkit.planning.machines import TABLE, published

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs_at_toy_size(gpu: Any, tmp_path: Path) -> None:
    """So that the first run on a GPU does not fail on a typo. flex_attention has no gradients on a CPU."""
    assert gpu.main(["--out", str(tmp_path), "--toy", "--here"]) == 0
    for part in gpu.PARTS:
        found = json.loads((tmp_path / f"{part}.json").read_text(encoding="utf-8"))
        assert "failed" not in found["result"], found
        pieces = {name: each for name, each in found["result"].items() if isinstance(each, dict)}
        failed = {name: each for name, each in pieces.items() if "failed" in each}
        assert set(failed) <= {"hfkit, flex_attention, documents masked"}, failed
        assert found["machine"]["torch"] and found["seconds"] > 0


def test_parts_that_are_done_are_skipped_and_those_that_fail_are_kept(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fails(size: Any) -> dict[str, Any]:
        calls.append("fails")
        raise ValueError("no such card")

    monkeypatch.setattr(gpu, "PARTS", {"fails": (fails, 1), "works": (lambda size: calls.append("works") or {}, 1)})
    keys = ["--out", str(tmp_path), "--here"]
    assert gpu.main(keys) == 0 and calls == ["fails", "works"]
    kept = json.loads((tmp_path / "fails.json").read_text(encoding="utf-8"))["result"]["failed"]
    assert "ValueError: no such card" in kept and "Traceback" in kept
    gpu.main(keys)
    assert calls == ["fails", "works"]
    gpu.main([*keys, "--retry"])
    assert calls == ["fails", "works", "fails"]


def test_a_part_that_the_budget_cuts_is_left_to_the_next_call(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that needs more than a whole call is a failure: it would be begun for ever."""

    def run(command: list[str], timeout: float, check: bool) -> None:
        part = command[command.index("--parts") + 1]
        if part == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        (tmp_path / f"{part}.json").write_text('{"result": {}}', encoding="utf-8")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "machine", dict)
    monkeypatch.setattr(gpu, "PARTS", {"quick": (None, 1), "slow": (None, 1), "last": (None, 1)})
    assert gpu.main(["--out", str(tmp_path)]) == 75
    assert "slow, last: left to the next call" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quick.json"]
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert "timed out" in json.loads((tmp_path / "slow.json").read_text(encoding="utf-8"))["result"]["failed"]
    assert (tmp_path / "last.json").is_file()


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
