"""What each part of `recipes/pretrain.yaml` is worth, at equal tokens: bits per byte over three seeds.

    python benchmarks/pretrain_ablation.py --out FOLDER   # writes benchmarks/results/pretrain_ablation.json

Each line adds something to the one before it; the first is the recipe of hfkit 0.1.0, the last the recipe as it is.
The last two have more steps than the others, and are not wider.
Every run is `hfkit run recipes/pretrain.yaml` with keys set, on the same rows, and is kept in FOLDER: a script that
was stopped goes on with the run that is missing.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
BEFORE = {
    "model": "{hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, residual_initialization: zero}",
    "optimizer": "muon",
    "train.per_device_train_batch_size": "16",
    "train.max_steps": "420",
    "train.lr_scheduler_type": "cosine",
    "train.lr_scheduler_kwargs": "{}",
    "train.warmup_steps": "0.05",
    "train.learning_rate": "8e-3",
}
UNTIED = (
    "{hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, residual_initialization: zero, "
    "tie_word_embeddings: false, embedding_initializer_range: 0.3, head_initializer_range: 0.001}"
)
ADDED: list[tuple[str, dict[str, str]]] = [
    ("hfkit 0.1.0", {}),
    ("twice the steps of half the rows", {"train.per_device_train_batch_size": "8", "train.max_steps": "840"}),
    ("an untied head, other deviations at the start", {"model": UNTIED}),
    (
        "rates of their own for embedding and head",
        {"optimizer": "{name: muon, embedding_learning_rate: 0.1, head_learning_rate: 8e-3}"},
    ),
    (
        "a constant rate, then linear decay",
        {
            "train.lr_scheduler_type": "warmup_stable_decay",
            "train.lr_scheduler_kwargs": "{num_decay_steps: 546, decay_type: linear, min_lr_ratio: 0.05}",
        },
    ),
    ("the same, half as wide again", {"model": UNTIED.replace("128", "192").replace("heads: 4", "heads: 6")}),
    (
        "one pass over the text, as wide as before",
        {
            "model": UNTIED,
            "train.max_steps": "1200",
            "train.lr_scheduler_kwargs": "{num_decay_steps: 780, decay_type: linear, min_lr_ratio: 0.05}",
        },
    ),
    ("the recipe: a tenth more of it", dict.fromkeys(BEFORE, "")),
]


def run(keys: dict[str, str], seed: int, folder: Path, name: str) -> dict[str, Any]:
    """The metrics of a run, made unless they are there."""
    output = folder / f"{name}-{seed}"
    if not (output / "metrics.json").exists():
        given = [f"{key}={value}" for key, value in keys.items() if value]
        command = [sys.executable, "-m", "hfkit", "run", str(HERE.parent / "recipes" / "pretrain.yaml")]
        subprocess.run(
            [*command, *given, f"train.seed={seed}", "train.save_strategy=no", f"output_dir={output}"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the lines to run, from 0")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    keys, rows = dict(BEFORE), []
    for number, (name, more) in enumerate(ADDED):
        keys |= more
        if options.only is not None and number not in options.only:
            continue
        found = [run(keys, seed, folder, f"line{number}") for seed in SEEDS]
        scores = [each["bits_per_byte"] for each in found]
        rows.append(
            {
                "name": name,
                "test_bits_per_byte": scores,
                "mean": statistics.mean(scores),
                "validation_bits_per_byte": [each["validation_bits_per_byte"] for each in found],
                "precision": found[0]["precision"],
                "parameters": found[0]["parameters"],
                "xz": found[0]["xz_bits_per_byte"],
            }
        )
        print(f"{name:<45} {rows[-1]['mean']:.3f}  " + " ".join(f"{score:.3f}" for score in scores), flush=True)
    result = {"machine": platform.processor() or platform.machine(), "seeds": SEEDS, "lines": rows}
    (HERE / "results" / "pretrain_ablation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
