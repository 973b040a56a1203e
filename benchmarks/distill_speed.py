"""Tokens per second and memory of a distillation: hfkit against trl's GKD trainer, and against training alone.

    pip install trl && python benchmarks/distill_speed.py     # writes benchmarks/results/distill_speed_<device>.json

Teacher and student are stock Llamas of 6.9 M and 1.9 M parameters with a vocabulary of 8,192; rows are full. All run
in one process, in turn and several times over, in the same precision; whole optimizer steps in the steady state count.
The peer learns forward KL from whole logits (lmbda 0, beta 0), without gradient checkpointing, which it has on by
default and which would make it slower. hfkit learns the same KL with its teacher beside it (online), and from sampled
targets on disk (cached); both are also held against the same student with cross-entropy alone, and against a loop as
one would write it by hand, compiled.

Memory is that of one loss, forward and backward, of 2,048 tokens with a vocabulary of 32,768, in a process each.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import StepTimes, device
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
from hfkit.training.trainer import HfkitTrainer, loading, training_arguments

TEACHER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
STUDENT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGE, LARGE_TOKENS, LARGE_WIDTHS = 32768, 2048, (256, 128)


class Sizes(NamedTuple):
    """Of the rows, of a step, and of both models: arguments of a configuration."""

    vocabulary: int = 8192
    tokens: int = 256
    rows: int = 8
    kept_rows: int = 256
    warm_up: int = 4
    teacher: dict[str, int] = TEACHER
    student: dict[str, int] = STUDENT


class Rows(torch.utils.data.Dataset):
    """Full rows of random tokens."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    def __len__(self) -> int:
        return self.sizes.kept_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, self.sizes.vocabulary, (self.sizes.tokens,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def model(shape: dict[str, int], sizes: Sizes) -> Any:
    torch.manual_seed(0)
    shape = {**shape, "vocab_size": sizes.vocabulary, "max_position_embeddings": sizes.tokens}
    with device():
        return LlamaForCausalLM(LlamaConfig(**{**shape, "tie_word_embeddings": True}, pad_token_id=0, eos_token_id=1))


def with_trl(sizes: Sizes, options: dict[str, Any], steps: int, folder: Path) -> float:
    """Seconds a step of trl's GKD trainer."""
    import datasets
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    words = {"<pad>": 0, "<eos>": 1, **{str(number): number for number in range(2, sizes.vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    rows = [Rows(sizes)[index] for index in range(sizes.kept_rows)]
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    columns["attention_mask"] = [[1] * sizes.tokens for _ in rows]
    own = {"lmbda": 0.0, "beta": 0.0, "gradient_checkpointing": False, "max_length": sizes.tokens}
    args = GKDConfig(str(folder / "trl"), max_steps=steps, **own, **options)
    trainer = GKDTrainer(
        model(sizes.student, sizes),
        model(sizes.teacher, sizes),
        args,
        lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in columns},
        datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.median(sizes.warm_up)


def plain_loop(sizes: Sizes, options: dict[str, Any], steps: int) -> float:
    """Seconds a step of a loop as one would write it by hand, compiled, with whole logits."""
    where, is_compiled = device(), options.get("torch_compile", True)
    student, teacher = (model(shape, sizes) for shape in (sizes.student, sizes.teacher))
    own, theirs = (torch.compile(each) if is_compiled else each for each in (student.train(), teacher.eval()))
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
    loader = torch.utils.data.DataLoader(Rows(sizes), sizes.rows, pin_memory=where.type == "cuda")
    batches, times = itertools.chain.from_iterable(itertools.repeat(loader)), StepTimes()
    times.on_train_begin()
    for batch in itertools.islice(batches, steps):
        ids = batch["input_ids"].to(where, non_blocking=True)
        with torch.autocast(where.type, torch.bfloat16, enabled=options["bf16"]):
            with torch.no_grad():
                expected = theirs(input_ids=ids, use_cache=False).logits[:, :-1]
            logits = own(input_ids=ids, use_cache=False).logits[:, :-1]
            logs = [functional.log_softmax(each, -1) for each in (logits, expected)]
            loss = functional.kl_div(*logs, reduction="none", log_target=True).sum() / logits[..., 0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.on_step_end()
    return times.median(sizes.warm_up)


def with_hfkit(kind: str, sizes: Sizes, options: dict[str, Any], steps: int, folder: Path) -> float:
    """Seconds a step of hfkit: `alone`, `online` or `cached`."""
    student, rows = model(sizes.student, sizes), Rows(sizes)
    own = {"torch_compile": True, "remove_unused_columns": False, "logging_nan_inf_filter": False}
    args = training_arguments({**own, **options, "max_steps": steps}, folder / kind, **loading(device()))
    is_compiled = args.torch_compile
    trainer: HfkitTrainer
    if kind == "alone":
        trainer = HfkitTrainer(student, args, train_dataset=rows)
    else:
        objective = Objective([Loss(loss="forward_kl")], student, student.config, sizes.vocabulary, is_compiled)
        cached = RowsWithTargets(rows, targets(sizes, folder)) if kind == "cached" else rows
        trainer = DistillationTrainer(student, args, objective=objective, train_dataset=cached)
        if kind == "online":
            placed = trainer.accelerator.prepare_model(model(sizes.teacher, sizes), evaluation_mode=True)
            trainer.teacher = Teacher(placed, set(), {}, is_compiled)
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.median(sizes.warm_up)


def targets(sizes: Sizes, folder: Path) -> Path:
    """The folder of the sampled targets, written once."""

    def load() -> Any:
        where, asked = device(), Teacher(model(sizes.teacher, sizes), set(), {})

        def logits_of(batch: dict[str, torch.Tensor]) -> Any:
            moved = {name: tensor.to(where) for name, tensor in batch.items()}
            return target_batches(asked, moved, sizes.vocabulary, chunk_tokens(sizes.vocabulary, where))

        return logits_of

    kind, width = Targets(source="cached"), sizes.vocabulary
    return write_targets(load, "teacher", Rows(sizes), "rows", kind, 1.0, width, folder, sizes.rows)


def contenders(sizes: Sizes, options: dict[str, Any], steps: int, folder: Path) -> dict[str, Callable[[], float]]:
    """Each gives the seconds of its steps."""
    return {
        "trl GKD": lambda: with_trl(sizes, options, steps, folder),
        "plain compiled loop": lambda: plain_loop(sizes, options, steps),
        "hfkit, cross-entropy alone": lambda: with_hfkit("alone", sizes, options, steps, folder),
        "hfkit, online": lambda: with_hfkit("online", sizes, options, steps, folder),
        "hfkit, cached": lambda: with_hfkit("cached", sizes, options, steps, folder),
    }


# ---- memory


def loss_memory(kind: str) -> None:
    """Print the bytes that one KL with its gradients takes, beside its inputs."""
    where = device()
    torch.manual_seed(0)
    hidden = [torch.randn(LARGE_TOKENS, width, device=where) for width in LARGE_WIDTHS]
    weights = [torch.randn(LARGE, width, device=where) * 0.05 for width in LARGE_WIDTHS]
    hidden[1].requires_grad_(True)
    weights[1].requires_grad_(True)
    before = _peak(where, fresh=True)
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

        loss, _ = chunked_head(hidden[1], weights[1], None, of_chunk, rows, chunk_tokens(LARGE, where))
    loss.backward()
    print(json.dumps({"bytes": _peak(where) - before, "loss": loss.item()}))


def _peak(where: torch.device, fresh: bool = False) -> int:
    """The most bytes in use so far; `fresh` begins anew with those in use now. On a CPU it is Linux that counts."""
    if where.type == "cuda":
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
    where, sizes = device(), Sizes()
    precision = devices.fastest_precision(where)[0]
    options: dict[str, Any] = {
        "per_device_train_batch_size": sizes.rows,
        "bf16": precision == "bf16",
        "use_cpu": where.type == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    steps = sizes.warm_up + choices.steps
    seconds: dict[str, list[float]] = {}
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(choices.rounds):
            for label, run in contenders(sizes, options, steps, folder).items():
                torch._dynamo.reset()
                seconds.setdefault(label, []).append(run())
                speed = sizes.rows * sizes.tokens / seconds[label][-1]
                print(f"round {number + 1}: {label}: {speed:,.0f} tokens/s", flush=True)
            peaks.append(devices.matmul_flops(where, torch.bfloat16 if precision == "bf16" else torch.float32))
        kept = json.loads((targets(sizes, folder) / "targets.json").read_text(encoding="utf-8"))
    speeds = {label: sizes.rows * sizes.tokens / statistics.median(each) for label, each in seconds.items()}
    student, teacher = (model(shape, sizes) for shape in (sizes.student, sizes.teacher))
    own, theirs = (
        training_flops_per_token(student, sizes.tokens),
        training_flops_per_token(teacher, sizes.tokens) / 3,
    )
    with_teacher = ("trl GKD", "plain compiled loop", "hfkit, online")
    result = {
        "device": torch.cuda.get_device_name() if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "precision": precision,
        "torch": torch.__version__,
        "parameters": {"teacher": teacher.num_parameters(), "student": student.num_parameters()},
        "roof_gflops": statistics.median(peaks) / 1e9,
        "tokens_per_second": speeds,
        "mfu": {
            label: speed * (own + (theirs if label in with_teacher else 0)) / statistics.median(peaks)
            for label, speed in speeds.items()
        },
        "online_to_trl": speeds["hfkit, online"] / speeds["trl GKD"],
        "online_to_plain_loop": speeds["hfkit, online"] / speeds["plain compiled loop"],
        "cached_to_trl": speeds["hfkit, cached"] / speeds["trl GKD"],
        "cached_to_alone": speeds["hfkit, cached"] / speeds["hfkit, cross-entropy alone"],
        "cached_bytes_per_token": kept["bytes_per_token"],
        "loss_memory": measured_memory(),
        "rounds": seconds,
    }
    path = Path(__file__).parent / "results" / f"distill_speed_{where.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
