"""A little of the work, done for real: random models of the right sizes on random tokens, in a process of their own.

What is timed is the code that will run, so that the times are those of this machine, its load and its libraries.
"""

import contextlib
import io
import os
import statistics
import tempfile
import time
from logging import ERROR, getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BEGUN = time.process_time()  # not the time of the clock: others load theirs beside it
getLogger("bitsandbytes").setLevel(ERROR)  # it speaks of kernels that it could not load
import datasets  # noqa: E402, F401 the imports are timed, and are those of a run
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hfkit.data.tasks.text import Text  # noqa: E402
from hfkit.distillation.settings import Distillation  # noqa: E402
from hfkit.distillation.trainer import student_trainer  # noqa: E402
from hfkit.planning import shapes  # noqa: E402
from hfkit.planning.random_rows import RandomRows  # noqa: E402
from hfkit.planning.work import Rehearsed, Steps, Training  # noqa: E402
from hfkit.runtime import devices, resources  # noqa: E402
from hfkit.training.classification import ClassificationTrainer  # noqa: E402
from hfkit.training.decisions import decide  # noqa: E402
from hfkit.training.settings import BadSteps, Optimizer  # noqa: E402
from hfkit.training.trainer import loading, training_arguments  # noqa: E402

IMPORT_SECONDS = time.process_time() - BEGUN
STEPS = 4  # of a training, the first of which does not count
NOT_REHEARSED = ("torch_compile", "bf16", "fp16", "dataloader_num_workers", "load_best_model_at_end", "max_steps",
                 "num_train_epochs", "eval_steps", "save_steps")  # fmt: skip


def speed() -> tuple[str, float, float, int]:
    """The fastest precision, its FLOP/s, how long the libraries took to load, and how many bytes they hold."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    held = max(_resident(os.getppid()), _resident())  # a part of them is not touched again after the fork
    return *devices.fastest_precision(device), IMPORT_SECONDS, held


def rehearse(trainings: list[Training], precision: str, limits: list[int]) -> Rehearsed:
    """
    Args:
        limits: of each the rows that fit into the time; at most those of its batch.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    base = _resident()
    shared = (
        max(_resident(os.getppid()) - base, 0) if device.type == "cpu" else 0
    )  # libraries not touched since the fork
    with resources.metered() as used, tempfile.TemporaryDirectory() as folder:
        steps = [
            _train(each, precision, rows, Path(folder), device) for each, rows in zip(trainings, limits, strict=True)
        ]
    return Rehearsed(steps, used.get("peak_memory_bytes", 0) + shared, base + shared)


# ---- training


def _train(part: Training, precision: str, rows: int, folder: Path, device: torch.device) -> Steps:
    begun = time.perf_counter()
    kept = {key: value for key, value in part.train.items() if key not in NOT_REHEARSED}
    kept |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "bf16": precision == "bf16"}
    kept |= {"fp16": precision == "fp16", "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
    model = shapes.build(part.model, part.attn_implementation)
    vocabulary = model.config.get_text_config().vocab_size
    data = RandomRows(part.lengths, STEPS * rows, vocabulary, part.model.classes)
    arguments, told = training_arguments(kept, folder), {**kept, **_of_compilation(part)}
    decided = decide(told, arguments, model, data, data.collate, part.optimizer)
    args = training_arguments(
        {**kept, "max_steps": STEPS, "disable_tqdm": True},
        folder,
        logging_steps=10**6,
        per_device_eval_batch_size=rows,
        remove_unused_columns=False,
        **loading(device),
    )
    clock = Clock(device, begun)
    trainer: Any
    if part.model.classes:
        trainer = ClassificationTrainer(
            model, args, BadSteps(), train_dataset=data, eval_dataset=data, data_collator=data.collate
        )
    else:
        settings = Distillation(
            task=Text(),
            student={},
            train={},
            losses=list(part.losses),
            sequence_length=part.lengths.longest,
            packing="documents",
            generation={},
            optimizer=Optimizer(name=part.optimizer),
            bad_steps=BadSteps(),
        )
        rows_of = SimpleNamespace(
            train=data,
            alone=data,
            validation=data,
            collate=data.collate,
            collate_alone=data.collate,
            generation={},
        )
        teacher = None if part.teacher is None else lambda: shapes.build(part.teacher).to(device)  # type: ignore
        decided["torch_compile"] = False
        trainer = student_trainer(settings, model, args, rows_of, None, teacher, vocabulary, decided)  # type: ignore[arg-type]
    trainer.add_callback(clock)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return clock.steps()


def _of_compilation(part: Training) -> dict[str, bool]:
    """What a recipe says of it, and what a distillation that compares layers does: then no pass decides it."""
    between_layers = any(each.spec.compares == "layers" for each in part.losses)
    told = part.train.get("torch_compile", False if between_layers else None)
    return {} if told is None else {"torch_compile": told}


class Clock(TrainerCallback):
    """Times each step, and its optimizer's part."""

    def __init__(self, device: torch.device, begun: float):
        self.device, self.begun, self.before_first = device, begun, 0.0
        self.ends: list[float] = []
        self.of_optimizer: list[float] = []
        self.before = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.before_first = self._now() - self.begun

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.before = self._now()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.of_optimizer.append(self._now() - self.before)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(self._now())

    def steps(self) -> Steps:
        whole = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        of_optimizer = statistics.median(self.of_optimizer[1:])
        return Steps(max(statistics.median(whole) - of_optimizer, 1e-6), of_optimizer, self.before_first)


def _resident(process: int | None = None) -> int:
    import psutil

    return psutil.Process(process).memory_info().rss
