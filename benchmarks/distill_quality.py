"""What a teacher is worth: students at equal tokens with and without one, from sampled targets, and cut out of it.

    python benchmarks/distill_quality.py DATA      # writes benchmarks/results/distill_quality.json

DATA is a folder of .txt books. One teacher is pretrained; each of three seeds then trains, on the same tokens,

- a student of a quarter of the teacher's parameters or fewer, with cross-entropy alone and with its teacher beside it;
- the same from cached, sampled targets;
- a student cut out of the teacher (`from_teacher`) with every second layer, and a cold one of its sizes: how many
  tokens the first needs to reach the validation loss at which the second ends.

Then a model fine-tuned to say what a function does (the task of recipes/finetune.yaml) is distilled into a student
cut out of it, and both are evaluated on the test split. Everything runs through `hfkit run`.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hfkit import cli
from hfkit.training.callbacks import read_log

SEEDS = (0, 1, 2)
TRAIN = """
  per_device_train_batch_size: 8
  lr_scheduler_type: cosine
  warmup_steps: 0.05
  eval_strategy: steps
  eval_steps: 20
  save_strategy: "no"
  report_to: none
"""
SMALL = "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, residual_initialization: zero}"
RECIPES = {
    "books": """\
stage: prepare
sources: [{files: DATA/*.txt, document: passage, limit: 1200}]
split: {validation: 0.02, test: 0.03}
""",
    "tokenizer": "stage: tokenizer\ndata: books.yaml\nvocab_size: 4096\n",
    "teacher": f"""\
stage: pretrain
data: books.yaml
tokenizer: tokenizer.yaml
model: {{hidden_size: 160, num_hidden_layers: 4, num_attention_heads: 4, residual_initialization: zero}}
sequence_length: 256
optimizer: muon
train:
  max_steps: 600
  learning_rate: 8e-3{TRAIN}""",
    "student": f"""\
stage: distill
teacher: teacher.yaml
data: books.yaml
student: {SMALL}
sequence_length: 256
losses: [{{loss: forward_kl}}]
optimizer: muon
train:
  max_steps: 200
  learning_rate: 1.6e-2{TRAIN}""",
    "functions": """\
stage: prepare
columns: {code: text, summary: text}
sources: [{builtin: python-functions}]
deduplicate: [code]
split: {validation: 0.05, test: 0.05}
""",
    "code": "stage: prepare\nsources: [{builtin: python-stdlib}]\nsplit: {validation: 0.05, test: 0.05}\n",
    "code-tokenizer": "stage: tokenizer\ndata: code.yaml\nvocab_size: 4096\n",
    "code-base": f"""\
stage: pretrain
data: code.yaml
tokenizer: code-tokenizer.yaml
model: {{hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, residual_initialization: zero}}
sequence_length: 256
optimizer: muon
train:
  max_steps: 420
  learning_rate: 8e-3{TRAIN}""",
    "task-teacher": f"""\
stage: finetune
model: code-base.yaml
data: functions.yaml
task: generate
prompt: "{{code}}\\n# In short: "
completion: "{{summary}}"
sequence_length: 256
train:
  num_train_epochs: 3
  learning_rate: 1e-3{TRAIN.replace("eval_steps: 20", "eval_steps: 400")}""",
    "task-student": f"""\
stage: distill
teacher: task-teacher.yaml
data: functions.yaml
student: {{from_teacher: {{layers: [0, 3]}}}}
task: generate
prompt: "{{code}}\\n# In short: "
completion: "{{summary}}"
sequence_length: 256
losses: [{{loss: forward_kl, weight: 0.9}}, {{loss: cross_entropy, weight: 0.1}}]
baseline: false
train:
  num_train_epochs: 4
  learning_rate: 2e-3{TRAIN.replace("eval_steps: 20", "eval_steps: 400")}""",
    "task-scores": """\
stage: evaluate
model: task-student.yaml
against: task-teacher.yaml
data: functions.yaml
task: generate
prompt: "{code}\\n# In short: "
completion: "{summary}"
limit: 400
metrics: [rouge, perplexity]
batch_size: 32
generation: {max_new_tokens: 32}
""",
}


def run(recipe: str, *options: str) -> dict[str, Any]:
    """Run a recipe, and return its metrics."""
    if cli.main(["run", f"recipes/{recipe}.yaml", *options]):
        raise SystemExit(f"{recipe} failed")
    folder = next((option.partition("=")[2] for option in options if option.startswith("output_dir=")), None)
    return json.loads((Path(folder or f"runs/{recipe}") / "metrics.json").read_text(encoding="utf-8"))


def curve(folder: str) -> list[tuple[int, float]]:
    lines = read_log(Path(folder) / "metrics.jsonl")
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def of_seed(seed: int) -> dict[str, Any]:
    """The losses of one seed, in bits per byte of test, and the share of the tokens that a cut-out student needs."""
    common = [f"train.seed={seed}"]
    online = run("student", *common, f"output_dir=runs/online-{seed}")
    cached = run("student", *common, "targets={source: cached}", "baseline=false", f"output_dir=runs/cached-{seed}")
    half = ["student={from_teacher: {layers: [0, 2]}}", "train.learning_rate=8e-3", "baseline=false"]
    cut = run("student", *common, *half, f"output_dir=runs/cut-{seed}")
    sizes = "{hidden_size: 160, num_hidden_layers: 2, num_attention_heads: 4, residual_initialization: zero}"
    cold = run(
        "student",
        *common,
        f"student={sizes}",
        "train.learning_rate=8e-3",
        "baseline=false",
        f"output_dir=runs/cold-{seed}",
    )
    last_step, last = curve(f"runs/cold-{seed}")[-1]
    reached = next((step for step, loss in curve(f"runs/cut-{seed}") if loss <= last), None)
    gap = online["alone_bits_per_byte"] - online["teacher_bits_per_byte"]
    return {
        "seed": seed,
        "teacher": online["teacher_bits_per_byte"],
        "alone": online["alone_bits_per_byte"],
        "online": online["bits_per_byte"],
        "cached": cached["bits_per_byte"],
        "gap_closed": online["gap_closed"],
        "gap_closed_cached": (online["alone_bits_per_byte"] - cached["bits_per_byte"]) / gap,
        "cached_to_online": cached["bits_per_byte"] / online["bits_per_byte"],
        "targets_bytes_per_token": cached["targets_bytes_per_token"],
        "targets_bias": cached["targets_bias"],
        "parameter_share": online["parameters"] / online["teacher_parameters"],
        "from_teacher": cut["bits_per_byte"],
        "cold": cold["bits_per_byte"],
        "from_teacher_token_share": reached / last_step if reached else None,
    }


def of_task() -> dict[str, Any]:
    """ROUGE-L of the student and of the teacher, with their intervals, and what share the student keeps."""
    found = run("task-scores")
    difference = found["rougeL_difference"]
    teacher = found["rougeL"] - difference
    keys = [
        f"rougeL{end}" for end in ("", "_low", "_high", "_difference", "_difference_low", "_difference_high", "_p")
    ]
    return {**{key: found[key] for key in keys}, "teacher_rougeL": teacher, "retention": found["rougeL"] / teacher}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of .txt books")
    parser.add_argument("--work", type=Path, help="folder that keeps the runs between calls")
    options = parser.parse_args()
    results, data = Path(__file__).resolve().parent / "results", options.data.resolve()
    folder = options.work or Path(tempfile.mkdtemp())
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    for name, text in RECIPES.items():
        (folder / f"recipes/{name}.yaml").write_text(text.replace("DATA", str(data)), encoding="utf-8")
    os.chdir(folder)
    seeds = [of_seed(seed) for seed in SEEDS]
    shares = [each["from_teacher_token_share"] for each in seeds if each["from_teacher_token_share"] is not None]
    result = {
        "gap_closed": statistics.mean(each["gap_closed"] for each in seeds),
        "gap_closed_cached": statistics.mean(each["gap_closed_cached"] for each in seeds),
        "cached_to_online": statistics.mean(each["cached_to_online"] for each in seeds),
        "from_teacher_token_share": statistics.mean(shares) if len(shares) == len(seeds) else None,
        "seeds": seeds,
        "task": of_task(),
    }
    path = results / "distill_quality.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
