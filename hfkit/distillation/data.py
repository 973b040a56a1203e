"""The rows that a student learns from, with the teacher's targets where they are kept on disk."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json
from hfkit.data import corpus
from hfkit.data.chat import generation_ids
from hfkit.data.rows.examples import Examples, PackedExamples, pad, show_example, task_examples
from hfkit.data.rows.packing import PackedRows, show_row, token_rows
from hfkit.data.tokenizer import load_tokenizer
from hfkit.distillation.aligned import add_alignment, aligned_rows
from hfkit.distillation.cache import RowsWithTargets, write_targets
from hfkit.distillation.generated import write_generated
from hfkit.distillation.settings import Distillation
from hfkit.distillation.teacher import Teacher, target_batches
from hfkit.runtime.distributed import on_main
from hfkit.training.chunked_head import chunk_tokens

Collate = Callable[[list[Any]], dict[str, torch.Tensor]]


@dataclasses.dataclass
class TrainingData:
    """All rows of a distillation.

    Attributes:
        train, collate: what the student learns from, with what it takes of the teacher.
        alone, collate_alone: the same for the student without a teacher: the data's own tokens.
        validation, test: whole rows, for losses.
        of_teacher: the same splits as the teacher reads them: with its tokenizer, where that is another.
        tokens_a_row: the mean, padding not counted.
        shown: the first row, for a person.
        generation: arguments of `GenerationConfig` for what the student writes, with the ids that end and pad it.
        facts: what the report and `metrics.json` say of the targets.
    """

    train: Any
    collate: Collate
    alone: Any
    collate_alone: Collate
    validation: Any
    test: Any
    of_teacher: dict[str, Any]
    tokens_a_row: float
    shown: str
    generation: dict[str, Any]
    facts: dict[str, Any]


def training_data(
    settings: Distillation,
    data_path: str,
    teacher_path: str,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Callable[[], PreTrainedModel],
    width: int,
    cache: Path,
) -> TrainingData:
    """Return the data, tokenized; and the teacher's targets, made where they are not there. Call it on every process.

    Args:
        teacher: loads the model; called only if it has to write something.
        width: how many leading logits teacher and student share.
    """
    folder, rows, collate = _rows(settings, data_path, tokenizer, cache)
    if settings.task.is_text:
        shown, tokens_a_row = show_row(rows["train"][0], tokenizer), float(settings.sequence_length)
    else:
        examples = Examples(folder, "train")
        shown, tokens_a_row = show_example(examples[0], tokenizer), examples.tokens / len(rows["train"])
    data = TrainingData(
        rows["train"],
        collate,
        rows["train"],
        collate,
        rows["validation"],
        rows["test"],
        rows,
        tokens_a_row,
        shown,
        {**generation_ids(tokenizer, settings.task.is_chat), **settings.generation},
        {},
    )
    if settings.targets.source == "cached":
        _with_cached_targets(data, settings, teacher_path, teacher, width, folder, cache)
    elif settings.targets.source == "generated":
        generated = write_generated(settings, data_path, teacher_path, tokenizer, teacher, cache)
        data.train = _rows(settings, str(generated), tokenizer, cache)[1]["train"]
    elif settings.cross_tokenizer is not None:
        theirs, length = load_tokenizer(teacher_path), settings.sequence_length
        path = on_main(
            "aligned", lambda: str(aligned_rows(settings.task, length, data_path, tokenizer, theirs, cache))
        )
        add_alignment(data, tokenizer, Path(path))
        data.of_teacher = _rows(settings, data_path, theirs, cache)[1]
    return data


def _rows(
    settings: Distillation, path: str, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> tuple[Path, Json, Collate]:
    """Return the folder of the tokenized data, its splits, and what makes a batch of their rows."""
    length = settings.sequence_length
    if settings.task.is_text:
        folder = on_main("tokens", lambda: str(token_rows(path, tokenizer, length, settings.packing, cache)))
        return Path(folder), {split: PackedRows(Path(folder), split) for split in corpus.SPLITS}, default_data_collator
    folder = on_main("examples", lambda: str(task_examples(path, settings.task, tokenizer, length, cache)))
    examples = {split: Examples(Path(folder), split) for split in corpus.SPLITS}
    if settings.targets.source == "on_policy" or settings.cross_tokenizer is not None:  # one prompt a row
        return Path(folder), examples, partial(pad, pad_token_id=tokenizer.pad_token_id)
    packed = {split: PackedExamples(rows, length, tokenizer.pad_token_id) for split, rows in examples.items()}
    return Path(folder), packed, default_data_collator


def _with_cached_targets(
    data: TrainingData,
    settings: Distillation,
    teacher_path: str,
    teacher: Callable[[], PreTrainedModel],
    width: int,
    folder: Path,
    cache: Path,
) -> None:
    def load() -> Any:
        model = teacher()
        chunk = chunk_tokens(width, model.device)
        wrapper = Teacher(model, set(), {})
        return lambda batch: target_batches(wrapper, _on(batch, model.device), width, chunk)

    divergence = next(loss for loss in settings.losses if loss.loss == "forward_kl")
    targets_folder = write_targets(
        load,
        f"{manifest.content_of(teacher_path)} {settings.teacher_quantization}",
        data.train,
        f"{folder.name}/train",
        settings.targets,
        divergence.temperature or 1.0,
        width,
        cache,
        settings.train.get("per_device_train_batch_size", 8),
    )
    data.train = RowsWithTargets(data.train, targets_folder)
    summary = manifest.read_json(targets_folder, "targets.json") or {}
    data.facts = {f"targets_{name}": summary[name] for name in ("bytes_per_token", "entries_per_token")}
    data.facts["targets_bias"] = summary["bias"]


def _on(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
