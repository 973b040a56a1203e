"""What smaller models lose: quantized, pruned, and pruned and recovered, of a model of 24 million parameters.

    python benchmarks/compression_quality.py BOOKS WIKITEXT      # writes benchmarks/results/compression_quality.json

BOOKS is a folder of .txt books, WIKITEXT one with the valid.txt and test.txt of WikiText-2. A decoder is pretrained on
the books. What is made of it is scored on WikiText-2 and on held-out passages of the books, in bits per byte:

- int8 and NF4, with what the folders take on disk beside one in fp32;
- half of all weights zeroed by magnitude, Wanda and SparseGPT, and 2:4 by SparseGPT with a recovery;
- half of the layers, or a third of the width, taken away and distilled on a tenth of the pretraining's tokens, beside
  a model of half the layers that was pretrained on all of them; and their speeds beside what their FLOPs promise.

Everything runs through `hfkit run`; a second call goes on from what the first has made.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hfkit import cli

STEPS, RECOVERY_STEPS = 600, 60
TRAIN = """
  per_device_train_batch_size: 8
  lr_scheduler_type: cosine
  warmup_steps: 0.05
  save_steps: 200
  report_to: none
"""
SCORED = "data: wikitext.yaml\ntask: text\nmetrics: [bits_per_byte]\nlimit: 400\n"
RECOVERED = f"""\
data: books.yaml
task: text
metrics: [bits_per_byte]
limit: 100
calibration: books.yaml
sequence_length: 256
recover:
  losses: [{{loss: forward_kl}}]
  optimizer: muon
train:
  max_steps: {RECOVERY_STEPS}
  learning_rate: 2e-3{TRAIN}"""
MODELS = """[base.yaml, int8.yaml, nf4.yaml, magnitude.yaml, wanda.yaml, sparsegpt.yaml, sparsegpt-2of4.yaml,
  depth.yaml, half-depth.yaml, width.yaml]"""


def pretrain(layers: int, hidden: int, intermediate: int, heads: int) -> str:
    sizes = f"hidden_size: {hidden}, num_hidden_layers: {layers}, intermediate_size: {intermediate}"
    return f"""\
stage: pretrain
data: books.yaml
tokenizer: tokenizer.yaml
model: {{{sizes}, num_attention_heads: {heads}, head_dim: 64, residual_initialization: zero}}
sequence_length: 256
optimizer: muon
train:
  max_steps: {STEPS}
  learning_rate: 5e-3{TRAIN}"""


RECIPES = {
    "books": """\
stage: prepare
sources: [{files: BOOKS/*.txt, document: passage}]
split: {validation: 0.01, test: 0.02}
""",
    "wikitext": """\
stage: prepare
sources:
  - {files: WIKITEXT/valid.txt, document: line}
  - {files: WIKITEXT/test.txt, document: line, into: test}
min_characters: 100
split: {validation: 0.1}
""",
    "tokenizer": "stage: tokenizer\ndata: books.yaml\nvocab_size: 8192\n",
    "base": pretrain(12, 384, 1024, 6),
    "half-depth": pretrain(6, 384, 1024, 6),
    "int8": f"stage: quantize\nmodel: base.yaml\n{SCORED}quantization: {{load_in_8bit: true}}\n",
    "nf4": f"""\
stage: quantize
model: base.yaml
{SCORED}quantization: {{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}}
""",
    **{
        method: f"stage: prune\nmodel: base.yaml\n{SCORED}{calibration}pruning: {{method: {method}, sparsity: 0.5}}\n"
        for method, calibration in (
            ("magnitude", ""),
            ("wanda", "calibration: books.yaml\nsequence_length: 256\n"),
            ("sparsegpt", "calibration: books.yaml\nsequence_length: 256\n"),
        )
    },
    "sparsegpt-2of4": f"stage: prune\nmodel: base.yaml\npruning: {{method: sparsegpt, sparsity: '2:4'}}\n{RECOVERED}",
    "depth": f"stage: prune\nmodel: base.yaml\npruning: {{method: depth, drop_layers: 6}}\n{RECOVERED}",
    "width": f"""\
stage: prune
model: base.yaml
pruning: {{method: width, hidden_size: 256, intermediate_size: 704, num_attention_heads: 4}}
{RECOVERED}""",
    "compare": f"stage: compare\nmodels: {MODELS}\n{SCORED}".replace("limit: 400", "limit: 150"),
    "compare-books": f"stage: compare\nmodels: {MODELS}\n{SCORED}".replace("wikitext", "books").replace("400", "50"),
}


def reading_speed(folder: str, rows: int = 8, tokens: int = 256) -> float:
    """Tokens/s of a forward pass, the median of several."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(rows * tokens).view(rows, tokens) % model.config.vocab_size
    seconds = []
    with torch.no_grad():
        for _ in range(7):
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - start)
    return rows * tokens / statistics.median(seconds[2:])


def forward_flops(folder: str, tokens: int = 256) -> float:
    """Multiplications and additions a token: two for each weight that multiplies, and those of attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    attention = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    return 2 * sum(parameter.numel() for parameter in model.parameters()) + attention


def compare(recipe: str) -> dict[str, Any]:
    if cli.main(["run", f"recipes/{recipe}.yaml"]):
        raise SystemExit(f"{recipe} failed")
    return json.loads(Path(f"runs/{recipe}/report.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="folder of .txt books")
    parser.add_argument("wikitext", type=Path, help="folder with valid.txt and test.txt")
    parser.add_argument("--work", type=Path, help="folder that keeps the runs between calls")
    options = parser.parse_args()
    results = Path(__file__).resolve().parent / "results"
    books, wikitext = str(options.books.resolve()), str(options.wikitext.resolve())
    folder = options.work or Path(tempfile.mkdtemp())
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    for name, text in RECIPES.items():
        text = text.replace("BOOKS", books).replace("WIKITEXT", wikitext)
        (folder / f"recipes/{name}.yaml").write_text(text, encoding="utf-8")
    os.chdir(folder)
    found, on_books = (compare(name) for name in ("compare", "compare-books"))
    models, of_books = ({row["name"]: row for row in each["models"]} for each in (found, on_books))
    base = models["base"]
    result = {
        "models": {
            name: {
                **{key: row[key] for key in row if key.startswith("bits_per_byte") or key == "size_bytes"},
                "bits_per_byte_to_base": row["bits_per_byte"] / base["bits_per_byte"],
                **{f"books_{key}": value for key, value in of_books[name].items() if key.startswith("bits_per_byte")},
                "books_bits_per_byte_to_base": of_books[name]["bits_per_byte"] / of_books["base"]["bits_per_byte"],
                "size_to_base": row["size_bytes"] / base["size_bytes"],
                "tokens_per_second": row["tokens_per_second"],
            }
            for name, row in models.items()
        },
        "narrow_speed_to_base": reading_speed("runs/width") / reading_speed("runs/base"),
        "narrow_speed_by_flops": forward_flops("runs/base") / forward_flops("runs/width"),
        "half_depth_speed_to_base": reading_speed("runs/depth") / reading_speed("runs/base"),
        "half_depth_speed_by_flops": forward_flops("runs/base") / forward_flops("runs/depth"),
        "compare_overhead": found["seconds"] / found["model_seconds"] - 1,
        "parameters": base["parameters"],
    }
    (results / "compression_quality.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
