"""Seconds that training waits for a committed checkpoint, against Trainer's plain save and one read of what it wrote.

    python benchmarks/checkpoint_overhead.py    # writes benchmarks/results/checkpoint_overhead.json

A committed checkpoint is written while training waits, and hashed, synced and renamed while it goes on. `commit` is
the time until all of that is done: it takes a processor, which on a CPU is one that trains. A plain save leaves its
bytes in the system's memory, and a power cut loses them, so it is also timed with a sync of its files. All are
measured in turn on one trainer. The read is of the files just written, from the system's memory.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import Trainer

from hfkit.artifacts import manifest
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.training.trainer import HfkitTrainer, training_arguments

ROUNDS = 7
SHAPE = {"vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, SHAPE["vocab_size"], (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def read(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # where runs are, not in a memory disk
        run = Path(name)
        manifest.write_json(run / manifest.STARTED, {"fingerprint": "benchmark"})
        values = {"max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "no", "disable_tqdm": True}
        trainer = HfkitTrainer(
            HfkitForCausalLM(HfkitConfig(**SHAPE)), training_arguments(values, run), train_dataset=Rows()
        )
        trainer.train()
        place = run / "checkpoint-1"
        times: dict[str, list[float]] = {
            "plain": [],
            "plain_synced": [],
            "read": [],
            "commit_waited_for": [],
            "commit": [],
        }
        for _ in range(ROUNDS):
            for kind in ("plain", "plain_synced", "commit"):
                shutil.rmtree(place, ignore_errors=True)
                os.sync()  # nothing of the round before is still being written
                if kind == "commit":
                    times["commit_waited_for"].append(seconds(lambda: trainer._save_checkpoint(trainer.model, None)))
                    finishing = seconds(trainer._wait_for_commit)
                    times["commit"].append(times["commit_waited_for"][-1] + finishing)
                else:
                    took = seconds(lambda: Trainer._save_checkpoint(trainer, trainer.model, None))
                    if kind == "plain":
                        times["read"].append(seconds(lambda: read(place)))
                    else:
                        took += seconds(lambda: manifest.sync_tree(place))
                    times[kind].append(took)
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    median = {kind: statistics.median(values) for kind, values in times.items()}
    result = {
        "bytes": size,
        "seconds": median,
        # What training waits for, beyond a plain save and one read of it, as a share of these two.
        "overhead": median["commit_waited_for"] / (median["plain"] + median["read"]) - 1,
        "overhead_if_it_waited_for_the_disk": median["commit"] / (median["plain_synced"] + median["read"]) - 1,
        "rounds": times,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_count": os.cpu_count(),
        "system": sys.platform,
    }
    path = Path(__file__).parent / "results" / "checkpoint_overhead.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
