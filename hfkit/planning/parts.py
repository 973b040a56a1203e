"""The parts of work that several stages share."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from hfkit.artifacts.cache import beside
from hfkit.compression.settings import WIDTHS
from hfkit.data.tasks import Task
from hfkit.distillation.settings import Distillation
from hfkit.evaluation.settings import Scoring
from hfkit.inference.generation import NEW_TOKENS
from hfkit.metrics.catalogue import made_of
from hfkit.planning import rows as of_rows
from hfkit.planning.rows import Rows
from hfkit.planning.shapes import shape_of
from hfkit.planning.work import (
    Chore,
    Known,
    Lengths,
    Measuring,
    Model,
    Reading,
    Texts,
    Tokens,
    Training,
    Work,
    Writing,
)
from hfkit.recipe.fields import Arguments
from hfkit.recipe.limits import COSTS
from hfkit.training.trainer import training_arguments

UNKNOWN = "what it takes is not known: {} is on the Hub and not in the cache"
USUAL_WINDOW = 1024
SCORING, SCORING_A_ROW = 0.8, 0.002  # seconds: of what a model has said, with its intervals
QUANTIZING = 1.0  # seconds, of the smallest model


def unknown(*names: str) -> Work:
    """The work of a stage whose inputs nothing is known of."""
    return Work([], notes=tuple(UNKNOWN.format(name) for name in names), is_exact=False)


def model_of(config: Any, known: Known) -> Model:
    return Model(config, known if isinstance(known, Tokens) else None)


def weight_bytes(model: Model) -> float:
    shape = shape_of(model, 8)
    return shape.weight_bytes if model.lora is None else 4.0 * shape.trained


def window_of(model: Model) -> int:
    """The most tokens that a model takes."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or USUAL_WINDOW


def batch_of(train: Arguments) -> int:
    return training_arguments(train, Path("unused")).train_batch_size


def reading(what: str, model: Model, rows: Rows, split: str, batch: int) -> list[Reading | Writing]:
    """The rows of a split; nothing where the data is not known."""
    return [Reading(what, model, *rows[split], batch)] if rows else []


def answering(
    what: str,
    task: Task,
    generation: Arguments,
    model: Model,
    texts: Texts | None,
    count: int,
    window: int,
    batch: int,
) -> list[Reading | Writing]:
    """The texts that a model writes for the first rows of a task."""
    if texts is None or not task.has_answers:
        return []
    most = generation.get("max_new_tokens", min(NEW_TOKENS, window // 2))
    prompt, new = of_rows.answers(task, texts, model.tokens, window, most)
    return [Writing(what, model, count, prompt, max(new, 1), min(batch, count))]


def scored(scoring: Scoring, model: Model, texts: Texts) -> tuple[Reading | Writing, ...]:
    """What scoring a model on rows does."""
    task, window, split, batch = scoring.task, window_of(model), scoring.split, scoring.batch_size
    count = min(texts.rows[split], scoring.limit or texts.rows[split])
    if task.is_text:
        rows, lengths = of_rows.windows(texts, model.tokens, split, scoring.limit, window)
        return (Reading("scoring", model, rows, lengths, batch),)
    found: list[Any] = []
    if made_of("texts", scoring.metrics):
        found += answering("answering", task, scoring.generation, model, texts, count, window, batch)
    if task.has_classes or made_of("likelihood", scoring.metrics):
        _, lengths = of_rows.examples(task, texts, model.tokens, window, is_packed=False)[split]
        found.append(Reading("scoring", model, count, lengths, batch))
    return tuple(found)


def measuring(scoring: Scoring, models: dict[str, Model], texts: Texts) -> list[Measuring]:
    """Models measured beside each other."""
    return [Measuring(f"measuring {name}", model, scored(scoring, model, texts)) for name, model in models.items()]


def training_rows(
    task: Task, texts: Texts | None, tokens: Tokens | None, length: int, packing: str, is_packed: bool = True
) -> Rows:
    """The rows of a training by its task."""
    if task.is_text:
        return of_rows.packed(texts, tokens, length, packing)
    return of_rows.examples(task, texts, tokens, length, is_packed)


def cache_of(output_dir: str | None) -> Path:
    """The folder beside the result that rows of tokens are kept in."""
    return beside(Path(output_dir or "runs/result").expanduser())


def making_rows(
    task: Task, texts: Texts | None, tokens: Tokens | None, length: int, packing: str, output_dir: str | None
) -> list[Chore]:
    """What making the rows of a task takes."""
    of_documents, of_task = (length, packing), (task.name, task, length)
    return of_rows.tokenizing(texts, tokens, cache_of(output_dir), *(of_documents if task.is_text else of_task))


def row_lengths(rows: Rows, length: int) -> tuple[int, Lengths]:
    """Of the training split; where the data is not known, rows that are full."""
    return rows["train"] if rows else (10**9, Lengths((length,), length - 1, length))


def cache_bytes(rows: Rows) -> float:
    """Of the tokens on disk."""
    return sum(4.0 * count * lengths.mean for count, lengths in rows.values()) if rows else 0.0


def not_counted(training: Training, rows: Rows) -> tuple[str, ...]:
    """What a plan cannot say where the data is not known."""
    if rows:
        return ()
    is_endless = training.train.get("max_steps", -1) > 0
    told = "its evaluations are not counted" if is_endless else "nor how many steps it has"
    return (f"how much data there is is not known here: {told}",)


def are_exact(texts: Texts | None, *tokens: Tokens | None) -> bool:
    return texts is not None and texts.is_exact and all(each is not None and each.is_exact for each in tokens)


def measuring_costs(models: dict[str, Model], accept: dict[str, str]) -> list[Measuring]:
    """The models that are measured where a training's limits are on costs."""
    if not set(accept) & set(COSTS):
        return []
    return [Measuring(f"measuring {name}", model, ()) for name, model in models.items()]


def of_targets(
    settings: Distillation, teacher: Model, rows: Rows, texts: Texts | None, batch: int
) -> list[Reading | Writing]:
    """What a teacher does before a distillation, once for a data set."""
    source = settings.targets.source
    if source == "cached":
        return [*reading("the teacher's targets", teacher, rows, "train", batch)]
    if source == "generated" and texts is not None:
        what, count, length = "the teacher's answers", texts.rows["train"], settings.sequence_length
        return answering(what, settings.task, settings.generation, teacher, texts, count, length, batch)
    return []


def pruned(base: Model, pruning: Any) -> tuple[Model, Model]:
    """The model without its adapter, and what is left of it. Masks leave all sizes as they are."""
    whole = dataclasses.replace(base, lora=None)
    config = copy.deepcopy(base.config)
    if pruning.method == "depth":
        config.num_hidden_layers -= pruning.drop_layers
    for name in WIDTHS if pruning.method == "width" else ():
        if (size := getattr(pruning, name)) is not None:
            setattr(config, name, size)
    return whole, dataclasses.replace(whole, config=config)
