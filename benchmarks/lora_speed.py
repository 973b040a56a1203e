"""Examples per second of LoRA fine-tuning: hfkit's finetune stage against PEFT with Trainer's defaults.

    python benchmarks/lora_speed.py            # writes benchmarks/results/lora_speed_<device>.json

The task is that of recipes/finetune.yaml: the first line of a function's docstring after its code. The base is a
decoder of 10 M parameters, pretrained for a moment. Both train the same adapter with the same learning rate on as many
examples for the same number of updates, each in a process of its own, in turn and several times over. The peer pads
each batch to its longest example, as its users do; a second peer has bf16 switched on. The first tenth of the steps,
which compile, does not count. Losses are those of all test completions, measured by hfkit for each adapter alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import StepTimes
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from hfkit import cli
from hfkit.data.rows.examples import Examples, PackedExamples
from hfkit.data.tokenizer import load_tokenizer
from hfkit.inference.likelihood import token_sums
from hfkit.model.loading import load_model
from hfkit.runtime import devices
from hfkit.runtime.cores import usable_cores

LENGTH, EXAMPLES_A_STEP, LEARNING_RATE = 256, 8, 1e-3
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
RECIPES = {
    "data": "stage: prepare\nsources: [{builtin: python-stdlib}]\nsplit: {validation: 0.05, test: 0.05}\n",
    "tokenizer": "stage: tokenizer\ndata: data.yaml\nvocab_size: 8192\n",
    "functions": """\
stage: prepare
columns: {code: text, summary: text}
sources: [{builtin: python-functions}]
deduplicate: [code]
split: {validation: 0.05, test: 0.05}
""",
    "base": f"""\
stage: pretrain
data: data.yaml
tokenizer: tokenizer.yaml
model: {{hidden_size: 320, num_hidden_layers: 6, num_attention_heads: 5}}
sequence_length: {LENGTH}
optimizer: muon
train: {{max_steps: 60, per_device_train_batch_size: 8, learning_rate: 8e-3, save_strategy: "no"}}
""",
    "finetune": f"""\
stage: finetune
model: base.yaml
data: functions.yaml
task: generate
prompt: "{{code}}\\n# In short: "
completion: "{{summary}}"
sequence_length: {LENGTH}
evaluation_rows: 1
lora: {json.dumps(LORA)}
train: {{learning_rate: {LEARNING_RATE}, save_strategy: "no", report_to: none, logging_steps: 5}}
""",
}


def examples() -> dict[str, Examples]:
    folder = next(path for path in Path("runs/.cache").glob("examples-*") if path.is_dir())
    return {split: Examples(folder, split) for split in ("train", "test")}


def with_trainer(steps: int, bf16: bool) -> float:
    """Seconds a step of PEFT and Trainer; the adapter is left in runs/peer."""
    import peft

    set_seed(42)
    tokenizer = load_tokenizer("runs/base")
    model: Any = peft.get_peft_model(load_model("runs/base", dtype=torch.float32), peft.LoraConfig(**LORA))
    options: dict[str, Any] = {"use_cpu": not torch.cuda.is_available(), "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(
        "runs/peer",
        max_steps=steps,
        per_device_train_batch_size=EXAMPLES_A_STEP,
        learning_rate=LEARNING_RATE,
        disable_tqdm=True,
        bf16=bf16,
        **options,
    )
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = Trainer(
        model,
        args,
        train_dataset=examples()["train"],
        data_collator=lambda rows: collate([_lists(row) for row in rows]),
    )
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    model.save_pretrained("runs/peer")
    tokenizer.save_pretrained("runs/peer")
    kept = times.times[1 + steps // 10 :]
    return (kept[-1] - kept[0]) / (len(kept) - 1)


def _lists(row: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    ids = row["input_ids"].tolist()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row["labels"].tolist()}


def with_hfkit(steps: int) -> float:
    """Seconds a step of the finetune stage; the adapter is left in runs/finetune."""
    from hfkit.training.callbacks import Speed

    times = StepTimes()
    begin = Speed.on_train_begin
    Speed.on_train_begin = lambda self, *a, **k: (self.trainer.add_callback(times), begin(self, *a, **k))[1]  # type: ignore[method-assign, assignment, return-value]
    train = examples()["train"]
    rows = len(PackedExamples(train, LENGTH, 0))
    rows_a_step = max(1, round(EXAMPLES_A_STEP * rows / len(train)))
    options = [f"train.max_steps={steps}", f"train.per_device_train_batch_size={rows_a_step}"]
    if cli.main(["run", "recipes/finetune.yaml", *options, "--rebuild"]):
        raise SystemExit("the fine-tuning failed")
    kept = times.times[1 + steps // 10 :]
    # A row holds several examples, of which there are not exactly as many in a step as the peer has.
    share = EXAMPLES_A_STEP / (rows_a_step * len(train) / rows)
    return (kept[-1] - kept[0]) / (len(kept) - 1) * share


def work(contender: str, steps: int) -> None:
    """One contender, in its own process: prints its seconds for EXAMPLES_A_STEP examples, and its memory."""
    torch.set_num_threads(usable_cores())
    seconds = with_hfkit(steps) if contender == "hfkit" else with_trainer(steps, contender.endswith("bf16"))
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:  # as Linux counts it; getrusage would tell that of the process that started this one
        peak = int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def test_loss(adapter: str) -> float:
    """In nats a token of the completions."""
    from hfkit.data.tasks import Example

    test, tokenizer = examples()["test"], load_tokenizer("runs/base")
    rows = [test[index] for index in range(len(test))]
    found = [Example(row["input_ids"].tolist(), (row["labels"] != -100).tolist()) for row in rows]
    nats, tokens = token_sums(load_model(adapter), found, 16, tokenizer.pad_token_id).sum(0)
    return float(nats / tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", type=Path, help="folder that keeps the base between calls")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    results = Path(__file__).resolve().parent / "results"
    if options.contender:
        work(options.contender, options.steps)
        return
    folder = options.work or Path(tempfile.mkdtemp())
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for name, text in RECIPES.items():
        Path(f"recipes/{name}.yaml").write_text(text, encoding="utf-8")
    if not Path("runs/finetune").exists() and cli.main(["run", "recipes/finetune.yaml", "train.max_steps=1"]):
        raise SystemExit("the base was not made")

    names = ["PEFT + Trainer", "PEFT + Trainer, bf16", "hfkit"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "--contender", name, "--steps", str(options.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            found[name][-1]["loss"] = test_loss("runs/finetune" if name == "hfkit" else "runs/peer")
            speed = EXAMPLES_A_STEP / found[name][-1]["seconds"]
            print(
                f"round {number + 1}: {name}: {speed:.1f} examples/s, loss {found[name][-1]['loss']:.4f}", flush=True
            )

    rows = {
        name: {
            "examples_per_second": EXAMPLES_A_STEP / statistics.median(each["seconds"] for each in rounds),
            "peak_bytes": statistics.median(each["peak_bytes"] for each in rounds),
            "test_loss": statistics.median(each["loss"] for each in rounds),
            "rounds": rounds,
        }
        for name, rounds in found.items()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = [rows[name]["examples_per_second"] for name in names]
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "base_parameters": load_model("runs/base").num_parameters(),
        "steps": options.steps,
        "roof_gflops": devices.fastest_precision(device)[1] / 1e9,
        "rows": rows,
        "ratio": speeds[2] / speeds[0],
        "ratio_to_bf16": speeds[2] / speeds[1],
        "memory_ratio": rows["hfkit"]["peak_bytes"] / rows["PEFT + Trainer"]["peak_bytes"],
    }
    (results / f"lora_speed_{device.type}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
