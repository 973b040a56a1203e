"""The rows that a student learns from, with the teacher's targets where they are kept on disk."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, default_data_collator

from hfkit.artifacts import manifest
from hfkit.data import corpus
from hfkit.data.chat import generation_ids
from hfkit.data.rows.examples import Examples, PackedExamples, pad, show_example, task_examples
from hfkit.data.rows.packing import PackedRows, show_row, token_rows
from hfkit.data.tokenizer import load_tokenizer
from hfkit.distillation.aligned import add_alignment, aligned_rows
from hfkit.distillation.cache import RowsWithTargets, write_targets
from hfkit.distillation.generated import write_generated
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
    recipe: Any,
    places: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    teacher: Callable[[], Any],
    width: int,
    cache: Path,
) -> TrainingData:
    """The data of a recipe, tokenized; and the teacher's targets, made where they are not there. Call it on every
    process.

    Args:
        teacher: loads the model; called only if it has to write something.
        width: how many leading logits teacher and student share.
    """
    folder, rows, collate = _rows(recipe, places["data"], tokenizer, cache)
    if recipe.task == "text":
        shown, tokens_a_row = show_row(rows["train"][0], tokenizer), float(recipe.sequence_length)
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
        {**generation_ids(tokenizer, recipe.task == "chat"), **recipe.generation},
        {},
    )
    if recipe.targets.source == "cached":
        _with_cached_targets(data, recipe, places, teacher, width, folder, cache)
    elif recipe.targets.source == "generated":
        place = write_generated(recipe, places, tokenizer, teacher, cache)
        data.train = _rows(recipe, str(place), tokenizer, cache)[1]["train"]
    elif recipe.cross_tokenizer is not None:
        theirs = load_tokenizer(places["teacher"])
        made = on_main("aligned", lambda: str(aligned_rows(recipe, places["data"], tokenizer, theirs, cache)))
        add_alignment(data, recipe, tokenizer, Path(made))
        data.of_teacher = _rows(recipe, places["data"], theirs, cache)[1]
    return data


def _rows(
    recipe: Any, place: str, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> tuple[Path, dict[str, Any], Collate]:
    """The folder of the tokenized data, its splits, and what makes a batch of their rows."""
    length = recipe.sequence_length
    if recipe.task == "text":
        made = on_main("tokens", lambda: str(token_rows(place, tokenizer, length, recipe.packing, cache)))
        return Path(made), {split: PackedRows(Path(made), split) for split in corpus.SPLITS}, default_data_collator
    made = on_main("examples", lambda: str(task_examples(place, recipe, tokenizer, length, cache)))
    examples = {split: Examples(Path(made), split) for split in corpus.SPLITS}
    if recipe.targets.source == "on_policy" or recipe.cross_tokenizer is not None:  # one prompt a row
        return Path(made), examples, partial(pad, pad_token_id=tokenizer.pad_token_id)
    packed = {split: PackedExamples(each, length, tokenizer.pad_token_id) for split, each in examples.items()}
    return Path(made), packed, default_data_collator


def _with_cached_targets(
    data: TrainingData,
    recipe: Any,
    places: dict[str, str],
    teacher: Callable[[], Any],
    width: int,
    folder: Path,
    cache: Path,
) -> None:
    def load() -> Any:
        model = teacher()
        chunk = chunk_tokens(width, model.device)
        asked = Teacher(model, set(), {})
        return lambda batch: target_batches(asked, _on(batch, model.device), width, chunk)

    divergence = next(each for each in recipe.losses if each.loss == "forward_kl")
    made = write_targets(
        load,
        f"{manifest.content_of(places['teacher'])} {recipe.teacher_quantization}",
        data.train,
        f"{folder.name}/train",
        recipe.targets,
        divergence.temperature or 1.0,
        width,
        cache,
        recipe.train.get("per_device_train_batch_size", 8),
    )
    data.train = RowsWithTargets(data.train, made)
    found = manifest.read_json(made, "targets.json") or {}
    data.facts = {f"targets_{name}": found[name] for name in ("bytes_per_token", "entries_per_token")}
    data.facts["targets_bias"] = found["bias"]


def _on(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
