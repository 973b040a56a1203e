"""What a training run decides by measuring: precision and compilation. Decided once, so that a resumed run agrees."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json
from hfkit.errors import HfkitError
from hfkit.recipe.fields import Arguments
from hfkit.runtime.devices import fastest_precision, matmul_flops
from hfkit.runtime.distributed import on_main, say
from hfkit.training.optimizers import fastest_orthogonalization
from hfkit.training.trainer import loading, training_arguments

Collate = Callable[[list[Any]], dict[str, torch.Tensor]]
COMPILE_SECONDS = 30.0  # cold, layer by layer on a CPU; warm it is less
COMPILE_GAIN = 0.15  # share of a step's time that it saves at least, see benchmarks/pretrain_speed.py


def settle(
    train: Arguments,
    output: Path,
    model: PreTrainedModel,
    rows: Any,
    what: Callable[[int], str],
    collate: Collate = default_data_collator,
    optimizer: str = "adamw",
) -> tuple[TrainingArguments, Json]:
    """Return the arguments of a training, with what measuring decides and hfkit's own defaults; and what was decided.

    It says what will be trained, and how; `what` says what the rows of a step are. Call it on every process.
    """
    args = training_arguments(train, output)
    decided = on_main("decide", lambda: decide(train, args, model, rows, collate, optimizer))
    args = training_arguments(
        {**train, **batches_for(decided, args)},
        output,
        bf16=decided["precision"] == "bf16",
        torch_compile=decided["torch_compile"] is True,
        per_device_eval_batch_size=args.per_device_train_batch_size,
        logging_nan_inf_filter=False,
        disable_tqdm=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        save_total_limit=2,
        **loading(args.device),
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "" if trained == model.num_parameters() else f", {trained:,} of them trained"
    of_a_step = what(decided["rows_a_step"])
    say(
        f"  {model.num_parameters():,} parameters{share}, {decided['steps']:,} steps of {of_a_step}, "
        f"{decided['precision']} on {args.device.type}, matmul peak {decided['roof_flops'] / 1e9:,.0f} GFLOP/s"
    )
    if decided["torch_compile"]:
        say("  the first step compiles the model, which can take a minute")
    return args, decided


def decide(
    train: Arguments,
    args: TrainingArguments,
    model: PreTrainedModel,
    rows: Any,
    collate: Collate = default_data_collator,
    optimizer: str = "adamw",
) -> Json:
    """Return `precision` (bf16, fp16 or fp32), `torch_compile` (False, True, or `layers`: layer by layer), the
    measured `roof_flops` of that precision, the `muon_precision` where Muon is the optimizer, and the `steps` to be
    made with the `rows_a_step` of all processes.

    What the recipe's `train:` section says stands. A run that is resumed takes what it decided when it began. Call it
    on the main process only.
    """
    folder = Path(args.output_dir or ".")
    started = manifest.read_json(folder, manifest.STARTED) or {}
    if "decisions" in started:
        return started["decisions"]
    if args.mixed_precision in ("bf16", "fp16"):
        precision, dtype = args.mixed_precision, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float16
        roof_flops = matmul_flops(args.device, dtype)
    elif "bf16" in train:
        precision, roof_flops = "fp32", matmul_flops(args.device, torch.float32)
    else:
        precision, roof_flops = fastest_precision(args.device)
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(len(rows) / rows_a_step))
    )
    pays = train.get("torch_compile")
    if pays is None:
        passes = steps * args.gradient_accumulation_steps
        pays = _compilation_pays(args, model, rows, collate, passes, precision)
        if pays and args.device.type == "cpu":
            pays = "layers"
    decisions = {
        "precision": precision,
        "torch_compile": pays,
        "roof_flops": roof_flops,
        "rows_a_step": rows_a_step,
        "steps": steps,
        "processes": args.world_size,
    }
    if optimizer == "muon":
        decisions["muon_precision"] = fastest_orthogonalization(model, args.device)
    manifest.write_json(folder / manifest.STARTED, {**started, "decisions": decisions})
    return decisions


def _compilation_pays(
    args: TrainingArguments,
    model: PreTrainedModel,
    rows: Any,
    collate: Collate,
    passes: int,
    precision: str,
) -> bool:
    """Return whether compilation saves more time than it takes, by the measured time of one pass without it."""
    if args.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        say("  no C++ compiler found: training without torch.compile (slower)")
        return False
    if args.device.type not in ("cpu", "cuda"):
        return False
    batch = collate([rows[index % len(rows)] for index in range(args.train_batch_size)])
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    model.to(args.device).train()
    dtype, seconds = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision), 0.0
    try:
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            with torch.autocast(args.device.type, dtype, enabled=dtype is not None):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            loss.item()  # waits for the device
            seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:  # of the logits, which a training never holds whole: a pass of that size is long
        seconds = math.inf
    model.zero_grad(set_to_none=True)
    return passes * seconds * COMPILE_GAIN > COMPILE_SECONDS


def batches_for(decided: Json, args: TrainingArguments) -> dict[str, int]:
    """Return `per_device_train_batch_size` and `gradient_accumulation_steps` with which a step has the rows it had
    when the run began, also on another number of processes. In the order of `EpochOrder` they are the very same rows.

    Raises:
        HfkitError: if the rows of a step cannot be dealt evenly.
    """
    rows, processes = decided["rows_a_step"], args.world_size
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    if batch * accumulation * processes == rows:
        return {}
    if rows % processes:
        raise HfkitError(
            f"this run was begun with {rows} rows a step on {decided['processes']} processes, and {processes} cannot "
            f"share them evenly: start it with {decided['processes']} processes again, or another divisor of {rows}"
        )
    share = rows // processes
    batch = next(size for size in range(min(batch, share), 0, -1) if share % size == 0)
    say(
        f"  begun on {_processes(decided['processes'])}, going on with {processes}: each step has the same {rows} "
        f"rows, {batch} in a batch, {share // batch} batches a process. Sums over processes are rounded differently, "
        f"and each process draws its own random numbers."
    )
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": share // batch}


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
