"""Sharded checkpoints: FSDP2 on two processes, stopped and resumed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hfkit import cli
from hfkit.training import checkpoints
from hfkit.training.callbacks import read_log
from tests.kit import on_two
from tests.test_distill import DISTILL

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
CPU = "train.use_cpu=true"
KEYS = [CPU, "train.max_steps=12", "train.save_steps=4", "model.attention_dropout=0.1"]
STOP = """
import os, signal
from hfkit.training.callbacks import MetricsFile
def stop(self, args, state, control, **kwargs):
    if state.global_step == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
MetricsFile.on_step_begin = stop
"""


def start(
    output: str, recipe: str = "recipes/pretrain.yaml", keys: list[str] = KEYS, **environment: str
) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    if not environment:
        return on_two(script, recipe, *keys, f"output_dir={output}", **FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script]
    return subprocess.run(
        [*command, recipe, *keys, f"output_dir={output}"],
        env={**os.environ, **FSDP, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.faults
def test_a_sharded_run_goes_on_exactly(ready: Path) -> None:
    """Stopped by a signal to one of two processes: both commit, and the sharded checkpoint is whole."""
    whole = start("runs/whole")
    assert whole.returncode == 0, whole.stderr
    (ready / "sitecustomize.py").write_text(STOP, encoding="utf-8")
    stopped = start("runs/parts", PYTHONPATH=str(ready))
    assert stopped.returncode != 0 and "the checkpoint of step 7 is committed" in stopped.stderr
    checkpoint = Path("runs/parts/checkpoint-7")
    shards = {path.name for path in (checkpoint / "pytorch_model_fsdp_0").iterdir()}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert checkpoints.problems_with(checkpoint) == []

    done = start("runs/parts")
    assert done.returncode == 0 and "resuming from runs/parts/checkpoint-7" in done.stdout
    digests = {
        hashlib.sha256(Path(f"runs/{name}/model.safetensors").read_bytes()).hexdigest() for name in ("whole", "parts")
    }
    assert len(digests) == 1
    logs = [[(line["step"], line["loss"], line["grad_norm"]) for line in read_log(Path(f"runs/{name}/metrics.jsonl"))]
            for name in ("whole", "parts")]  # fmt: skip
    assert logs[0] == logs[1] and len(logs[0]) == 12
    with safe_open("runs/parts/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 tied: stored once, as without shards


def test_a_sharded_teacher_teaches_the_same(ready: Path) -> None:
    """Teacher and student in shards: the losses are those of one process, and the folder loads alone."""
    assert cli.main(["run", "recipes/pretrain.yaml"]) == 0
    Path("recipes/distill.yaml").write_text(DISTILL, encoding="utf-8")
    keys = ["losses=[{loss: forward_kl}, {loss: hidden_states, weight: 0.1}]", "baseline=false", CPU]
    done = start("runs/sharded", "recipes/distill.yaml", [*keys, "train.per_device_train_batch_size=2"])
    assert done.returncode == 0, done.stderr
    assert cli.main(["run", "recipes/distill.yaml", *keys, "output_dir=runs/whole"]) == 0
    found = [
        [(line["loss"], line["grad_norm"]) for line in read_log(Path(f"runs/{name}/metrics.jsonl")) if "loss" in line]
        for name in ("sharded", "whole")
    ]
    assert len(found[0]) == 4 and np.allclose(found[0], found[1], rtol=1e-4)
    names = {path.name for path in Path("runs/sharded").iterdir()}
    assert "modeling_hfkit.py" in names and not any("fsdp" in name for name in names)
    model = AutoModelForCausalLM.from_pretrained("runs/sharded", trust_remote_code=True)
    assert model.config.auto_map["AutoModelForCausalLM"] == "modeling_hfkit.HfkitForCausalLM"
