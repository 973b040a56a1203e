"""Bits per byte at equal parameters and equal tokens: hfkit's recipe against stock Llama with AdamW and cosine decay.

    python benchmarks/pretrain_quality.py --corpus BOOKS/*.txt   # writes benchmarks/results/pretrain_quality.json

Both read the same packed rows in the same order. The stock model gets the best of three learning rates, each with
three seeds; hfkit has one learning rate, three seeds. Without --corpus the text is the Python standard library.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from hfkit import cli
from hfkit.data.rows.packing import PackedRows, token_rows
from hfkit.data.tokenizer import load_tokenizer
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.runtime import devices
from hfkit.training.settings import Optimizer
from hfkit.training.trainer import HfkitTrainer, training_arguments

WIDTH, LAYERS, HEADS, TOKENS, ROWS, VOCABULARY = 128, 4, 4, 256, 16, 4096
STOCK_RATES, OUR_RATE, SEEDS = (2e-3, 4e-3, 8e-3), 8e-3, (0, 1, 2)


def stock_model(vocab_size: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=HfkitConfig(hidden_size=WIDTH, num_attention_heads=HEADS).intermediate_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def our_model(vocab_size: int) -> PreTrainedModel:
    config = HfkitConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=TOKENS,
        residual_initialization="zero",
    )
    return HfkitForCausalLM(config)


def prepare(corpus: list[str], folder: Path) -> tuple[Path, int]:
    """The packed rows of the corpus, and the size of the vocabulary."""
    sources: list[dict[str, Any]] = [{"files": path, "document": "passage"} for path in corpus]
    data = {
        "stage": "prepare",
        "sources": sources or [{"builtin": "python-stdlib"}],
        "output_dir": str(folder / "data"),
    }
    tokenizer = {
        "stage": "tokenizer",
        "data": "data.yaml",
        "vocab_size": VOCABULARY,
        "output_dir": str(folder / "tok"),
    }
    for name, recipe in (("data", data), ("tok", tokenizer)):
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML too
    if cli.main(["run", str(folder / "tok.yaml")]):
        raise SystemExit("the corpus could not be prepared")
    loaded = load_tokenizer(str(folder / "tok"))
    return token_rows(str(folder / "data"), loaded, TOKENS, "documents", folder), len(loaded)


def train(model: PreTrainedModel, rows: Path, optimizer: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """Train and give the test split's numbers."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "max_steps": steps,
            "per_device_train_batch_size": ROWS,
            "per_device_eval_batch_size": ROWS,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "seed": seed,
            "bf16": devices.fastest_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))[0]
            == "bf16",
            "save_strategy": "no",
            "report_to": "none",
        }
        args = training_arguments(values, Path(folder))
        trainer = HfkitTrainer(
            model, args, train_dataset=PackedRows(rows, "train"), optimizer=Optimizer(name=optimizer)
        )
        trainer.train()
        return trainer.evaluate(PackedRows(rows, "test"), metric_key_prefix="test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="*", default=[], help="text files")
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    logging.set_verbosity_error()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows, vocab_size = prepare(options.corpus, Path(folder))
        for seed in SEEDS:
            for name, rate in [("hfkit", OUR_RATE), *(("stock", rate) for rate in STOCK_RATES)]:
                set_seed(seed)
                model = our_model(vocab_size) if name == "hfkit" else stock_model(vocab_size)
                begun = time.perf_counter()
                found = train(model, rows, "muon" if name == "hfkit" else "adamw", rate, seed, options.steps)
                run = {"model": name, "learning_rate": rate, "seed": seed, "parameters": model.num_parameters()}
                run |= {"bits_per_byte": found["test_bits_per_byte"], "seconds": time.perf_counter() - begun}
                print(json.dumps(run), flush=True)
                runs.append(run)

    def mean(name: str, rate: float) -> float:
        found = [run["bits_per_byte"] for run in runs if run["model"] == name and run["learning_rate"] == rate]
        return statistics.mean(found)

    best = min(STOCK_RATES, key=lambda rate: mean("stock", rate))
    result = {
        "corpus": "files" if options.corpus else "python-stdlib",
        "tokens": options.steps * ROWS * TOKENS,
        "hfkit": mean("hfkit", OUR_RATE),
        "stock": {str(rate): mean("stock", rate) for rate in STOCK_RATES},
        "best_stock_learning_rate": best,
        "reduction": 1 - mean("hfkit", OUR_RATE) / mean("stock", best),
        "parameter_ratio": runs[0]["parameters"] / runs[1]["parameters"],
        "runs": runs,
    }
    path = Path(__file__).parent / "results" / "pretrain_quality.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()
