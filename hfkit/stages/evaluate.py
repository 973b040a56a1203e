"""Evaluate a model on a task: scores with their intervals, and a paired test against another model."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from hfkit import manifest
from hfkit.data import corpus
from hfkit.data.tasks import Example, TaskRecipe, check_columns, encode, prompt_ids, reference
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.ranks import on_main, say
from hfkit.recipe import Input, Section, StageRecipe

MAKES, DISTRIBUTED = "evaluation", True
Metric = Literal[
    "perplexity", "bits_per_byte", "bleu", "chrf", "rouge", "exact_match", "accuracy", "f1", "length", "distinct"
]
DEFAULTS: dict[str, list[str]] = {
    "text": ["perplexity", "bits_per_byte"],
    "generate": ["rouge", "bleu", "chrf", "exact_match", "perplexity"],
    "chat": ["rouge", "bleu", "exact_match", "perplexity"],
    "classify": ["accuracy", "f1"],
}


class Recipe(TaskRecipe):
    """Scores of a model on data that it was not trained on."""

    stage: Literal["evaluate"]
    model: Annotated[str, Input("model")]
    data: Annotated[str, Input("data set")]
    against: Annotated[str | None, Input("model")] = pydantic.Field(
        None, description="Another model for the same task: each score is then tested against it, row by row."
    )
    task: Literal["text", "generate", "chat", "classify"] = pydantic.Field(
        "generate", description="text: whole documents, by their likelihood. The others as in finetune."
    )
    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = pydantic.Field(None, ge=1, description="Take no more than this many rows.")
    metrics: list[Metric] | None = pydantic.Field(
        None, min_length=1, description="By default those that fit the task. bleu is sacrebleu's, 0 to 100."
    )
    batch_size: int = pydantic.Field(16, ge=1, description="Rows at once on each process.")
    generation: Annotated[dict[str, Any], Section("transformers.GenerationConfig")] = {}
    trust_remote_code: bool = pydantic.Field(False, description="Run the code that comes with the model.")

    @property
    def chosen(self) -> list[str]:
        return list(self.metrics or DEFAULTS[self.task])


def check(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Iterator[tuple[str, str]]:
    """What can be known before a model is loaded."""
    from hfkit.model.loading import load_config

    fitting = DEFAULTS[recipe.task] + (
        ["chrf", "length", "distinct", "bits_per_byte"] if recipe.task != "classify" else []
    )
    for index, name in enumerate(recipe.chosen):
        if name not in fitting or (recipe.task == "text" and name not in DEFAULTS["text"]):
            allowed = ", ".join(dict.fromkeys(DEFAULTS["text"] if recipe.task == "text" else fitting))
            yield f"metrics.{index}", f"{name} does not fit `task: {recipe.task}`; those that do: {allowed}"
    if problem := corpus.problem_with(places["data"]):
        yield "data", problem
        return
    planned = getattr(recipes.get("data"), "columns", None)
    columns = planned or (corpus.columns_of(places["data"]) if Path(places["data"]).is_dir() else None)
    if columns is not None and recipe.task == "text" and "text" not in columns:
        yield "data", f'{places["data"]}: has no column "text"; choose another task'
    elif columns is not None and recipe.task != "text":
        yield from check_columns(recipe, columns)
    for key in ("model", "against"):
        if key in places and Path(places[key]).is_dir():
            try:
                load_tokenizer(places[key])
                load_config(places[key], recipe.trust_remote_code)
            except HfkitError as error:
                yield key, str(error)


def external(recipe: Recipe) -> dict[str, Any]:
    return {}


def describe(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> dict[str, Any]:
    return {"task": recipe.task, "metrics": ", ".join(recipe.chosen)}


def run(recipe: Recipe, places: dict[str, str], output: Path) -> dict[str, Any]:
    from transformers.utils import logging

    from hfkit.evaluation import scoring

    logging.disable_progress_bar()
    rows = list(islice(corpus.rows(places["data"], recipe.split), recipe.limit))
    if not rows:
        raise HfkitError(f"data: the {recipe.split} split of {places['data']} has no rows; choose another split")
    predictions, found = _evaluate(recipe, places["model"], rows)
    others = _evaluate(recipe, places["against"], rows)[1] if "against" in places else None

    results = on_main("scores", lambda: scoring.scores(found, others))
    if predictions:
        per_row = scoring.row_scores({name: each for name, each in found.items() if name != "likelihood"}, len(rows))
        for row, values in zip(predictions, per_row, strict=True):
            row["scores"] = values
        on_main("predictions", lambda: scoring.write_predictions(output / "predictions.jsonl", predictions))
    say("\n".join(["", *scoring.table(results), ""]))
    if predictions and (key := next(iter(predictions[0]["scores"]), None)):
        for kind, row in scoring.best_worst_random(predictions, key):
            prediction, expected = repr(row["prediction"][:100]), repr(row["references"][0][:100])
            say(f"  {kind:<7} {key} {row['scores'][key]:.3g}: {prediction}, expected {expected}")
    say("".join(f"\n  {each.signature}" for each in found.values()))
    return {**results, "rows": len(rows), "signatures": [each.signature for each in found.values()]}


def _evaluate(recipe: Recipe, place: str, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The predictions of a model, and the statistics of its scores."""
    import torch

    from hfkit.evaluation import likelihood, scoring
    from hfkit.evaluation.generation import answers
    from hfkit.model.loading import load_model
    from hfkit.training import roof

    say(f"  {place}, {len(rows):,} rows of {recipe.split}")
    tokenizer = load_tokenizer(place)
    made = (manifest.read_json(Path(place)) or {}).get("recipe", {})
    model: Any = load_model(
        place, recipe.task, quantization=made.get("quantization"), trust_remote_code=recipe.trust_remote_code
    )
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    roof.use_all_cores(device)
    if made.get("quantization") is None:
        model.to(device)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    found: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    if recipe.task == "classify":
        examples = [
            encode(recipe, row, tokenizer, window) or Example([tokenizer.eos_token_id], [True]) for row in rows
        ]
        texts = likelihood.classes(model, examples, recipe.batch_size, tokenizer.pad_token_id)
        references = [[str(row[recipe.label])] for row in rows]
        found = scoring.statistics(recipe.chosen, texts, references, sorted(model.config.id2label.values()))
    elif recipe.task != "text" and set(recipe.chosen) & set(scoring.OF_TEXTS):
        texts = answers(recipe, rows, model, tokenizer, recipe.batch_size, window)
        references = [reference(recipe, row) for row in rows]
        found = scoring.statistics(recipe.chosen, texts, references, None)
    if found:
        shown = [
            tokenizer.decode(prompt_ids(recipe, row, tokenizer, window)[0], skip_special_tokens=True) for row in rows
        ]
        predictions = [
            {"prompt": prompt, "prediction": text, "references": several}
            for prompt, text, several in zip(shown, texts, references, strict=True)
        ]
    if set(recipe.chosen) & set(scoring.OF_LIKELIHOOD):
        found["likelihood"] = _likelihood(recipe, model, tokenizer, rows, window)
    return predictions, found


def _likelihood(recipe: Recipe, model: Any, tokenizer: Any, rows: list[dict[str, Any]], window: int) -> Any:
    """Of each row nats, tokens and bytes: of the whole text, or of what a task has to be completed with."""
    import numpy as np

    from hfkit.evaluation import likelihood
    from hfkit.evaluation.base import Statistics

    examples: list[Example] = []
    owners: list[int] = []
    sizes = np.zeros(len(rows))
    for index, row in enumerate(rows):
        if recipe.task == "text":
            pieces, text = likelihood.encode_document(row["text"], tokenizer, window), row["text"]
        else:
            example = encode(recipe, row, tokenizer, window)
            pieces = [example] if example is not None else []
            text = tokenizer.decode(example.learned_ids, skip_special_tokens=True) if example is not None else ""
        examples += pieces
        owners += [index] * len(pieces)
        sizes[index] = len(text.encode())
    sums = np.zeros((len(rows), 3))
    np.add.at(sums[:, :2], owners, likelihood.token_sums(model, examples, recipe.batch_size, tokenizer.pad_token_id))
    sums[:, 2] = sizes

    def combine(total: np.ndarray) -> dict[str, float]:
        return {name: value for name, value in likelihood.perplexity(total).items() if name in recipe.chosen}

    return Statistics(sums, combine, f"likelihood|task:{recipe.task}|window:{window}|rows:{len(rows)}")
