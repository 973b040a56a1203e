"""Seconds from the command to the first training step, everything prepared and nothing compiled; and hfkit's share.

    python benchmarks/startup.py            # writes benchmarks/results/startup.json

hfkit's share is what is left when the time is taken away that a process needs to import torch and transformers'
Trainer and to take one step of a stock model of that size in it, measured in turn with the command.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROUNDS = 5
OPTIONS = [
    "train.max_steps=1",
    "train.logging_steps=1",
    "train.torch_compile=false",
    "train.save_strategy=no",
    "train.eval_strategy=no",
]
# The same step with the libraries alone: the launcher, the imports, a model of that size, Trainer, one step.
PEER = """
import os, time, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index):
        ids = torch.randint(0, 4096, (256,))
        return {"input_ids": ids, "labels": ids}
shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **shape))
torch.set_num_threads(os.cpu_count())
args = TrainingArguments("out", max_steps=1, per_device_train_batch_size=16, save_strategy="no", disable_tqdm=True)
Trainer(model, args, train_dataset=Rows()).train()
print("FIRST STEP", time.time())
"""


def seconds_to(marker: str, command: list[str], folder: Path) -> float:
    """Seconds until a line with `marker` comes out of the command. It is then left to end by itself."""
    begun = time.time()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    found = None
    for line in process.stdout:
        if found is None and marker in line:
            found = time.time() - begun
    if process.wait() or found is None:
        raise SystemExit(f"{command} failed")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "recipes", folder / "recipes")
        (folder / "peer.py").write_text(PEER, encoding="utf-8")
        hfkit = ["accelerate", "launch", "recipes/pretrain.yaml", *OPTIONS]
        subprocess.run(hfkit, cwd=folder, check=True, capture_output=True)  # prepares data, tokenizer and token rows
        ours, peers = [], []
        for _ in range(ROUNDS):
            shutil.rmtree(folder / "runs/pretrain")
            ours.append(seconds_to("step 1/1", hfkit, folder))
            peers.append(seconds_to("FIRST STEP", ["accelerate", "launch", "peer.py"], folder))
        result = {
            "command_to_first_step": statistics.median(ours),
            "libraries_alone": statistics.median(peers),
            "hfkit_share": statistics.median(a - b for a, b in zip(ours, peers, strict=True)),
            "rounds": {"hfkit": ours, "libraries": peers},
            "python": sys.version.split()[0],
        }
    path = ROOT / "benchmarks" / "results" / "startup.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
