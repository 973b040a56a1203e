"""Tokens per second and memory of a distillation: hfkit against trl's GKD trainer, and against training alone.

    pip install trl && python benchmarks/distill_speed.py     # writes benchmarks/results/distill_speed_<device>.json

Teacher and student are stock Llamas of 6.9 M and 1.9 M parameters with a vocabulary of 8,192; rows are full. All run
in one process, in turn and several times over, in the same precision; whole optimizer steps in the steady state count.
The peer learns forward KL from whole logits (lmbda 0, beta 0), without gradient checkpointing, which it has on by
default and which would make it slower. hfkit learns the same KL with its teacher beside it (online), and from sampled
targets on disk (cached); both are also held against the same student with cross-entropy alone.

Memory is that of one loss, forward and backward, of 2,048 tokens with a vocabulary of 32,768, in a process each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import StepTimes
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfkit.distillation.cache import RowsWithTargets, write_targets
from hfkit.distillation.objective import Objective
from hfkit.distillation.settings import Loss, Targets
from hfkit.distillation.teacher import Teacher, target_batches
from hfkit.distillation.trainer import DistillationTrainer
from hfkit.model.flops import training_flops_per_token
from hfkit.runtime import devices
from hfkit.training.chunked_head import chunk_tokens
from hfkit.training.trainer import HfkitTrainer, training_arguments

VOCABULARY, TOKENS, ROWS, KEPT_ROWS = 8192, 256, 8, 256
WARM_UP = 4
TEACHER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
STUDENT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGE, LARGE_TOKENS, LARGE_WIDTHS = 32768, 2048, (256, 128)


class Rows(torch.utils.data.Dataset):
    """Full rows of random tokens."""

    def __len__(self) -> int:
        return KEPT_ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def model(sizes: dict[str, int]) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, pad_token_id=0, eos_token_id=1))


def with_trl(teacher: Any, options: dict[str, Any], steps: int, folder: str) -> float:
    """Seconds a step of trl's GKD trainer."""
    import datasets
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    words = {"<pad>": 0, "<eos>": 1, **{str(number): number for number in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    rows = [Rows()[index] for index in range(KEPT_ROWS)]
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    columns["attention_mask"] = [[1] * TOKENS for _ in rows]
    own = {"lmbda": 0.0, "beta": 0.0, "gradient_checkpointing": False, "max_length": TOKENS}
    args = GKDConfig(folder, max_steps=steps, **own, **options)
    trainer = GKDTrainer(
        model(STUDENT),
        teacher,
        args,
        lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in columns},
        datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.median(WARM_UP)


def with_hfkit(kind: str, teacher: Any, options: dict[str, Any], steps: int, folder: Path) -> float:
    """Seconds a step of hfkit: `alone`, `online` or `cached`."""
    student, rows = model(STUDENT), Rows()
    own = {"torch_compile": True, "remove_unused_columns": False, "logging_nan_inf_filter": False}
    args = training_arguments({**own, **options, "max_steps": steps}, folder / kind)
    is_compiled = args.torch_compile
    trainer: HfkitTrainer
    if kind == "alone":
        trainer = HfkitTrainer(student, args, train_dataset=rows)
    else:
        objective = Objective([Loss(loss="forward_kl")], student, teacher.config, VOCABULARY, is_compiled)
        cached = RowsWithTargets(rows, targets(teacher, folder)) if kind == "cached" else rows
        trainer = DistillationTrainer(student, args, objective=objective, train_dataset=cached)
        if kind == "online":
            placed = trainer.accelerator.prepare_model(teacher, evaluation_mode=True)
            trainer.teacher = Teacher(placed, set(), {}, is_compiled)
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.median(WARM_UP)


def targets(teacher: Any, folder: Path) -> Path:
    """The folder of the sampled targets, written once."""
    asked, device = Teacher(teacher, set(), {}), teacher.device

    def logits_of(batch: dict[str, torch.Tensor]) -> Any:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        return target_batches(asked, moved, VOCABULARY, chunk_tokens(VOCABULARY, device))

    return write_targets(
        lambda: logits_of, "teacher", Rows(), "rows", Targets(source="cached"), 1.0, VOCABULARY, folder, ROWS
    )


# ---- memory


def loss_memory(kind: str) -> None:
    """Print the bytes that one KL with its gradients takes, beside its inputs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = [torch.randn(LARGE_TOKENS, width, device=device) for width in LARGE_WIDTHS]
    weights = [torch.randn(LARGE, width, device=device) * 0.05 for width in LARGE_WIDTHS]
    hidden[1].requires_grad_(True)
    weights[1].requires_grad_(True)
    before = _peak(device, fresh=True)
    if kind == "dense":
        teacher = functional.linear(hidden[0], weights[0]).detach()
        logs = [functional.log_softmax(each, -1) for each in (functional.linear(hidden[1], weights[1]), teacher)]
        loss = functional.kl_div(*logs, reduction="none", log_target=True).sum()
    else:
        from hfkit.distillation.losses import forward_kl
        from hfkit.training.chunked_head import chunked_head

        def of_chunk(logits: torch.Tensor, teacher: torch.Tensor) -> Any:
            total = forward_kl(logits, teacher).sum()
            return total, total.detach()[None]

        def rows(part: slice) -> tuple[torch.Tensor]:
            return (functional.linear(hidden[0][part], weights[0]).detach(),)

        loss, _ = chunked_head(hidden[1], weights[1], None, of_chunk, rows, chunk_tokens(LARGE, device))
    loss.backward()
    print(json.dumps({"bytes": _peak(device) - before, "loss": loss.item()}))


def _peak(device: torch.device, fresh: bool = False) -> int:
    """The most bytes in use so far; `fresh` begins anew with those in use now. On a CPU it is Linux that counts."""
    if device.type == "cuda":
        if fresh:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if fresh:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measured_memory() -> dict[str, Any]:
    found = {}
    # What is freed goes back at once: what is counted is what is in use, not what the C library keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    for kind in ("dense", "chunked"):
        command = [sys.executable, __file__, "--memory", kind]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    if abs(found["dense"]["loss"] / found["chunked"]["loss"] - 1) > 1e-4:
        raise SystemExit(f"the losses differ: {found}")
    return {**found, "ratio": found["chunked"]["bytes"] / found["dense"]["bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--memory", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    choices = parser.parse_args()
    if choices.memory:
        loss_memory(choices.memory)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = devices.fastest_precision(device)[0]
    options: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "bf16": precision == "bf16",
        "use_cpu": device.type == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    steps = WARM_UP + choices.steps
    seconds: dict[str, list[float]] = {}
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = model(TEACHER).to(device)
        contenders: dict[str, Callable[[], float]] = {
            "trl GKD": lambda: with_trl(model(TEACHER), options, steps, str(folder / "trl")),
            "hfkit, cross-entropy alone": lambda: with_hfkit("alone", teacher, options, steps, folder),
            "hfkit, online": lambda: with_hfkit("online", teacher, options, steps, folder),
            "hfkit, cached": lambda: with_hfkit("cached", teacher, options, steps, folder),
        }
        for number in range(choices.rounds):
            for label, run in contenders.items():
                torch._dynamo.reset()
                seconds.setdefault(label, []).append(run())
                speed = ROWS * TOKENS / seconds[label][-1]
                print(f"round {number + 1}: {label}: {speed:,.0f} tokens/s", flush=True)
            peaks.append(devices.matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32))
        kept = json.loads((targets(teacher, folder) / "targets.json").read_text(encoding="utf-8"))
    speeds = {label: ROWS * TOKENS / statistics.median(each) for label, each in seconds.items()}
    own, theirs = (
        training_flops_per_token(model(STUDENT), TOKENS),
        training_flops_per_token(teacher, TOKENS) / 3,
    )
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "precision": precision,
        "torch": torch.__version__,
        "parameters": {"teacher": teacher.num_parameters(), "student": model(STUDENT).num_parameters()},
        "roof_gflops": statistics.median(peaks) / 1e9,
        "tokens_per_second": speeds,
        "mfu": {
            label: speed * (own + (theirs if label in ("trl GKD", "hfkit, online") else 0)) / statistics.median(peaks)
            for label, speed in speeds.items()
        },
        "online_to_trl": speeds["hfkit, online"] / speeds["trl GKD"],
        "cached_to_trl": speeds["hfkit, cached"] / speeds["trl GKD"],
        "cached_to_alone": speeds["hfkit, cached"] / speeds["hfkit, cross-entropy alone"],
        "cached_bytes_per_token": kept["bytes_per_token"],
        "loss_memory": measured_memory(),
        "rounds": seconds,
    }
    path = Path(__file__).parent / "results" / f"distill_speed_{device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
