"""Tokens per second of a training step: hfkit against Trainer with a stock Llama, and against a plain compiled loop.

    python benchmarks/pretrain_speed.py            # writes benchmarks/results/pretrain_speed.json

All in one process, in turn and several times over, on the same rows. hfkit and the loop have the optimizer that
`--optimizer` names (of Muon, the loop has torch's), Trainer its own AdamW. hfkit's model has QK-norm on top of
Llama's arithmetic; "documents masked" adds the block mask of packed documents, which the peers do not have.
What is timed is whole optimizer steps in the steady state: the first ones, which compile, are left out and their time
is told apart. The roof is a 2048^3 (GPU: 8192^3) matrix product, measured between the rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import StepTimes, device
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.model.flops import training_flops_per_token
from hfkit.runtime import devices
from hfkit.training.settings import Optimizer
from hfkit.training.trainer import HfkitTrainer, loading, training_arguments

VOCABULARY, WIDTH, INTERMEDIATE, LAYERS, HEADS, TOKENS, ROWS = 8192, 256, 704, 6, 4, 256, 16
WARM_UP = 2


class Rows(torch.utils.data.Dataset):
    """Full rows of random tokens. `documents` is how many make up a row; more than none, and the rows have positions,
    which begin anew at each and make transformers build a block mask."""

    def __init__(self, documents: int = 0, vocabulary: int = VOCABULARY, tokens: int = TOKENS):
        self.documents, self.vocabulary, self.tokens = documents, vocabulary, tokens

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, self.vocabulary, (self.tokens,), generator=torch.Generator().manual_seed(index))
        row = {"input_ids": ids, "labels": ids}
        if self.documents:
            row["position_ids"] = torch.arange(self.tokens) % (self.tokens // self.documents)
        return row


def stock_model() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=True,
        )
    )


def our_model() -> PreTrainedModel:
    return HfkitForCausalLM(
        HfkitConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=TOKENS,
        )
    )


def with_trainer(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    rows: Rows,
    steps: int,
    optimizer: str = "adamw",
    **options: Any,
) -> list[float]:
    """The times of the steps, in seconds. Of Trainer the optimizer is its own."""
    times = StepTimes()
    values = {"max_steps": steps, "per_device_train_batch_size": ROWS, "save_strategy": "no", **options}
    with tempfile.TemporaryDirectory() as folder:
        if trainer_class is HfkitTrainer:
            args = training_arguments(values, Path(folder), logging_nan_inf_filter=False, **loading(device()))
            trainer: Trainer = HfkitTrainer(model, args, train_dataset=rows, optimizer=Optimizer(name=optimizer))
        else:
            args = TrainingArguments(output_dir=folder, **values)
            trainer = Trainer(model, args, train_dataset=rows)
        trainer.add_callback(times)
        trainer.train()
    return times.steps()


def plain_loop(
    model: PreTrainedModel,
    steps: int,
    bf16: bool,
    where: torch.device,
    rows: Rows | None = None,
    batch: int = ROWS,
    is_compiled: bool = True,
    optimizer: str = "adamw",
) -> list[float]:
    """The times of the steps of a loop as one would write it by hand, with torch.compile."""
    model = model.to(where).train()
    compiled = torch.compile(model) if is_compiled else model
    of_muon = [each for each in model.get_decoder().layers.parameters() if each.ndim == 2 and optimizer == "muon"]
    taken = {id(each) for each in of_muon}
    rest = [each for each in model.parameters() if id(each) not in taken]
    optimizers: list[Any] = [torch.optim.AdamW(rest, lr=5e-5, fused=True)]
    optimizers += [torch.optim.Muon(of_muon, lr=5e-5, adjust_lr_fn="match_rms_adamw")] if of_muon else []
    rows, times = rows or Rows(), []
    for step in range(steps):
        begun = time.perf_counter()
        ids = torch.stack([rows[step * batch + index]["input_ids"] for index in range(batch)]).to(where)
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    options = parser.parse_args()
    where = device()
    precision = devices.fastest_precision(where)[0] if options.precision == "auto" else options.precision
    bf16, dtype = precision == "bf16", torch.bfloat16 if precision == "bf16" else torch.float32
    common: dict[str, Any] = {
        "bf16": bf16,
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": where.type == "cpu",
    }
    steps = WARM_UP + options.steps

    contenders: dict[str, Callable[[], list[float]]] = {
        "Trainer defaults, stock Llama": lambda: with_trainer(Trainer, stock_model(), Rows(), steps, **common),
        "plain loop, torch.compile, stock Llama": lambda: plain_loop(
            stock_model(), steps, bf16, where, optimizer=options.optimizer
        ),
        "hfkit": lambda: with_trainer(
            HfkitTrainer, our_model(), Rows(), steps, options.optimizer, **common, torch_compile=True
        ),
        "hfkit, documents masked": lambda: with_trainer(
            HfkitTrainer, our_model(), Rows(documents=2), steps, options.optimizer, **common, torch_compile=True
        ),
        "hfkit, not compiled": lambda: with_trainer(
            HfkitTrainer, our_model(), Rows(), steps, options.optimizer, **common
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, float] = {}
    roofs = [devices.matmul_flops(where, dtype)]
    for round_number in range(options.rounds):
        for name, run in contenders.items():
            torch._dynamo.reset()
            times = run()
            first.setdefault(name, times[0])
            seconds[name].append(statistics.median(times[WARM_UP:]))
            print(f"round {round_number + 1}: {name}: {ROWS * TOKENS / seconds[name][-1]:,.0f} tokens/s", flush=True)
        roofs.append(devices.matmul_flops(where, dtype))

    flops = training_flops_per_token(our_model(), TOKENS)
    peak = statistics.median(roofs)
    rows = {}
    for name in contenders:
        speed = ROWS * TOKENS / statistics.median(seconds[name])
        share = speed * flops / peak
        rows[name] = {"tokens_per_second": speed, "mfu": share, "first_step_seconds": first[name]}
    ours, trainer_row, loop_row = (
        rows[name]["tokens_per_second"]
        for name in ("hfkit", "Trainer defaults, stock Llama", "plain loop, torch.compile, stock Llama")
    )
    result = {
        "device": torch.cuda.get_device_name() if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "precision": precision,
        "optimizer": options.optimizer,
        "torch": torch.__version__,
        "roof_gflops": peak / 1e9,
        "rows": rows,
        "ratio_to_trainer": ours / trainer_row,
        "ratio_to_compiled_loop": ours / loop_row,
    }
    path = (
        Path(__file__).parent
        / "results"
        / f"pretrain_speed_{where.type}_{precision}{'_muon' * (options.optimizer == 'muon')}.json"
    )
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
