"""What needs a GPU: `pytest -m gpu`. Deselected elsewhere."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
PRETRAIN = "recipes/pretrain.yaml"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def launch(config: str, *options: str) -> dict[str, float]:
    """Train through the launcher with one of the repository's configurations, on one process."""
    text = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text(encoding="utf-8"))
    Path("config.yaml").write_text(yaml.safe_dump({**text, "num_processes": 1}), encoding="utf-8")
    command = ["accelerate", "launch", "--config_file", "config.yaml", PRETRAIN, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path("runs/pretrain/metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("config", ["one_gpu", "fsdp2"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_configuration_trains(ready: Path, config: str, optimizer: str) -> None:
    metrics = launch(config, f"optimizer={optimizer}", "train.max_steps=30")
    log = [json.loads(line) for line in Path("runs/pretrain/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert metrics["loss"] < log[0]["loss"]
    decided = json.loads(Path("runs/pretrain/hfkit.json").read_text(encoding="utf-8"))
    assert decided["stage"] == "pretrain" and metrics["tokens_per_second"] > 0


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_every_attention_gives_the_same_loss(ready: Path, attention: str) -> None:
    options = ["train.max_steps=3", "model.num_attention_heads=2"]  # flex_attention takes heads of 16 at least
    reference = launch("one_gpu", *options, "attn_implementation=eager")["loss"]
    Path("runs/pretrain").rename("runs/eager")
    found = launch("one_gpu", *options, f"attn_implementation={attention}")["loss"]
    assert found == pytest.approx(reference, rel=2e-2)


def test_compiled_training_gives_the_same_loss(ready: Path) -> None:
    plain = launch("one_gpu", "train.max_steps=10")["loss"]
    Path("runs/pretrain").rename("runs/plain")
    assert launch("one_gpu", "train.max_steps=10", "train.torch_compile=true")["loss"] == pytest.approx(
        plain, rel=2e-2
    )
