"""A little of the work, done for real: random models of the right sizes on random tokens, in a process of their own.

What is timed is the code that will run, so that the times are those of this machine, its load and its libraries.
"""

import contextlib
import dataclasses
import functools
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from logging import ERROR, getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BEGUN = time.process_time()  # not the time of the clock: others load theirs beside it
getLogger("bitsandbytes").setLevel(ERROR)  # it speaks of kernels that it could not load
import datasets  # noqa: E402, F401 the imports are timed, and are those of a run
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hfkit.data.tasks import Example  # noqa: E402
from hfkit.data.tasks.text import Text  # noqa: E402
from hfkit.distillation.settings import Distillation  # noqa: E402
from hfkit.distillation.trainer import student_trainer  # noqa: E402
from hfkit.inference import likelihood  # noqa: E402
from hfkit.inference.decoding import Rules, decode  # noqa: E402
from hfkit.inference.generation import plain_decoder  # noqa: E402
from hfkit.model.loading import load_model  # noqa: E402
from hfkit.planning import shapes  # noqa: E402
from hfkit.planning.random_rows import RandomRows  # noqa: E402
from hfkit.planning.work import Model, Reading, Training, Writing  # noqa: E402
from hfkit.runtime import devices, resources  # noqa: E402
from hfkit.training.classification import ClassificationTrainer  # noqa: E402
from hfkit.training.decisions import decide  # noqa: E402
from hfkit.training.settings import BadSteps, Optimizer  # noqa: E402
from hfkit.training.trainer import loading, training_arguments  # noqa: E402

IMPORT_SECONDS = time.process_time() - BEGUN
STEPS = 4  # of a training, the first of which does not count
FEW, MORE = 4, 12  # tokens that are written, to know what one takes
MANY = 5  # batches that are read
NOT_REHEARSED = ("torch_compile", "bf16", "fp16", "dataloader_num_workers", "load_best_model_at_end", "max_steps",
                 "num_train_epochs", "eval_steps", "save_steps")  # fmt: skip
BITSANDBYTES = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclasses.dataclass
class Rehearsed:
    """
    Args:
        seconds: of each part the whole, as if all of it were done; of a training one pass and one step.
        peak: most bytes that the process held, or on a GPU torch, libraries included.
        base: bytes before it began: Python and the libraries.
    """

    seconds: list[Any]
    peak: int
    base: int


@dataclasses.dataclass(frozen=True)
class Steps:
    """
    Args:
        of_pass: seconds of a forward and backward pass of one batch.
        of_optimizer: what the optimizer adds to a step.
        before: until the first step: making the model, deciding by measuring, Trainer.
    """

    of_pass: float
    of_optimizer: float
    before: float


def speed() -> tuple[str, float, float, int]:
    """The fastest precision, its FLOP/s, how long the libraries took to load, and how many bytes they hold."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    held = max(_resident(os.getppid()), _resident())  # a part of them is not touched again after the fork
    return *devices.fastest_precision(device), IMPORT_SECONDS, held


def rehearse(parts: list[Any], precision: str, limits: list[int]) -> Rehearsed:
    """
    Args:
        parts: trainings, readings and writings, in their order.
        limits: of each part the rows that fit into the time; at most those of its batch.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    base = _resident()
    shared = (
        max(_resident(os.getppid()) - base, 0) if device.type == "cpu" else 0
    )  # libraries not touched since the fork
    seconds: list[Any] = []
    trainer: Any = None
    known: dict[str, float] = {}
    with resources.metered() as used, tempfile.TemporaryDirectory() as folder:
        for part, rows in zip(parts, limits, strict=True):
            if isinstance(part, Training):
                steps, trainer = _train(part, precision, rows, Path(folder), device)
                seconds.append(steps)
            elif isinstance(part, Reading):
                seconds.append(_once(part, known, lambda: _read(part, rows, trainer, device)))  # noqa: B023 called here
            else:
                seconds.append(_write(part, rows, trainer, device))
    return Rehearsed(seconds, used.get("peak_memory_bytes", 0) + shared, base + shared)


def _once(part: Reading, known: dict[str, float], read: Callable[[], float]) -> float:
    """Seconds of a part, read only if no other of such rows was."""
    key = f"{part.model.key} {part.lengths} {part.batch} {part.of == 'teacher'}"
    if key not in known:
        known[key] = read() / part.rows
    return known[key] * part.rows


# ---- training


def _train(part: Training, precision: str, rows: int, folder: Path, device: torch.device) -> tuple[Steps, Any]:
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
    return clock.steps(), trainer


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


# ---- reading and writing


def _read(part: Reading, rows: int, trainer: Any, device: torch.device) -> float:
    """Seconds for all rows of the part: what more batches take than a few, for what the first ones take is more."""
    batches = RandomRows(part.lengths, MANY * rows, _vocabulary(part.model), part.model.classes)
    ids = [batches[index]["input_ids"].tolist() for index in range(MANY * rows)]
    model = trainer.model if trainer is not None else _open(part.model, device)
    if trainer is not None and part.of == "teacher":
        model = trainer.accelerator.prepare_model(_open(part.model, device), evaluation_mode=True)
    if trainer is not None:
        trainer.data_collator = batches.collate

    def read(count: int) -> None:
        if trainer is not None and part.model.classes:
            trainer.evaluate(_some(batches, count))
        elif trainer is not None:
            trainer.token_metrics(_some(batches, count), "", model)
        elif part.model.classes:
            likelihood.classes(model, ids[:count], rows, 0)
        else:
            likelihood.token_sums(model, [Example(each, [True] * len(each)) for each in ids[:count]], rows, 0)

    read(rows)
    few, many = (_time(lambda count=count: read(count * rows)) for count in (1, MANY))  # type: ignore[misc]
    a_row = max(many - few, 0.1 * many) / ((MANY - 1) * rows)
    return max(few - a_row * rows, 0) + a_row * part.rows


def _some(rows: RandomRows, count: int) -> RandomRows:
    return RandomRows(rows.lengths, count, rows.vocabulary, rows.classes)


def _write(part: Writing, rows: int, trainer: Any, device: torch.device) -> float:
    """Seconds for all texts of the part, by a few tokens of one batch."""
    model = trainer.model.eval() if trainer is not None and not part.is_generate else _open(part.model, device)
    prompts = torch.randint(_vocabulary(part.model), (rows, max(part.prompt_tokens, 1)), device=device)

    def write(tokens: int) -> None:
        if part.is_generate or plain_decoder(model) is None:
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                pad_token_id=0,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
        else:
            rules = Rules(None, [], tokens, None, 0, 0)
            list(decode(plain_decoder(model), prompts.tolist(), rules, rows))

    with torch.no_grad():
        write(2)
        few, more = (min(_time(lambda count=count: write(count)) for _ in range(2)) for count in (FEW, MORE))  # type: ignore[misc]
    a_token = max((more - few) / (MORE - FEW), 0)
    reading = max(few - FEW * a_token, 0)  # of the prompts of a batch
    batches = part.prompts / rows
    return batches * (reading + part.new_tokens * a_token) if batches > 1 else reading + part.new_tokens * a_token


@functools.lru_cache(maxsize=4)
def _opened(key: str, device: str, model: Model) -> Any:
    bare = dataclasses.replace(model, lora=None)
    made = shapes.build(model if not model.method else bare)
    if model.method == "bitsandbytes" and model.quantization is not None:
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            told = {name: model.quantization[name] for name in BITSANDBYTES if name in model.quantization}
            return load_model(folder, bool(model.classes), dtype=torch.bfloat16, quantization=told).eval()
    return made.to(device).eval()


def _open(model: Model, device: torch.device) -> Any:
    return _opened(model.key, str(device), model)


def _vocabulary(model: Model) -> int:
    return model.config.get_text_config().vocab_size


def _time(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _resident(process: int | None = None) -> int:
    import psutil

    return psutil.Process(process).memory_info().rss
