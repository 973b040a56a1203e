"""Evaluate a model on a task: scores with their intervals, and a paired test against another model."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import pydantic

from hfkit import manifest
from hfkit.data import corpus
from hfkit.data.tasks import TaskRecipe, check_data, reference
from hfkit.errors import HfkitError
from hfkit.ranks import on_main, say
from hfkit.recipe import Input, Section, StageRecipe, is_there

if TYPE_CHECKING:
    import numpy as np

    from hfkit.evaluation.inputs import Inputs

MAKES, DISTRIBUTED = "evaluation", True
Metric = Literal[
    "perplexity", "bits_per_byte", "bleu", "chrf", "rouge", "exact_match", "accuracy", "f1", "length", "distinct"
]
OF_ANSWERS = ["rouge", "bleu", "chrf", "exact_match", "perplexity", "bits_per_byte", "length", "distinct"]
NOT_COMPARED = ("perplexity_difference", "perplexity_difference_low", "perplexity_difference_high", "perplexity_p")
FITTING: dict[str, list[str]] = {
    "text": ["perplexity", "bits_per_byte"],
    "generate": OF_ANSWERS,
    "chat": OF_ANSWERS,
    "classify": ["accuracy", "f1"],
}


class Recipe(TaskRecipe):
    """Scores of a model on data that it was not trained on."""

    stage: Literal["evaluate"]
    model: Annotated[str, Input("model")]
    data: Annotated[str | None, Input("data set")] = pydantic.Field(
        None, description="What to evaluate on. Without it, the benchmarks are all."
    )
    against: Annotated[str | None, Input("model")] = pydantic.Field(
        None, description="Another model for the same task: each score is then tested against it, row by row."
    )
    task: Literal["text", "generate", "chat", "classify"] = pydantic.Field(
        "generate", description="text: whole documents, by their likelihood. The others as in finetune."
    )
    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = pydantic.Field(None, ge=1, description="Take no more than this many rows, of benchmarks too.")
    metrics: list[Metric] | None = pydantic.Field(
        None, min_length=1, description="By default all that fit the task. bleu is sacrebleu's, 0 to 100."
    )
    tokenize: str = pydantic.Field(
        "auto",
        description="How rouge, bleu, length and distinct cut words. auto: by the script of each row's references. "
        "ascii: as rouge_score, not for bleu. Or a tokenizer of sacrebleu: 13a, intl, char, zh, ja-mecab ...",
    )
    benchmarks: list[str] | None = pydantic.Field(
        None, min_length=1, description="Tasks of lm-evaluation-harness, by name, or folders with YAML files of tasks."
    )
    batch_size: int = pydantic.Field(16, ge=1, description="Rows at once on each process.")
    generation: Annotated[dict[str, Any], Section("transformers.GenerationConfig")] = {}
    trust_remote_code: bool = pydantic.Field(False, description="Run the code that comes with the model.")

    @property
    def chosen(self) -> list[str]:
        return [] if self.data is None else list(self.metrics or FITTING[self.task])


def check(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Iterator[tuple[str, str]]:
    """What can be known before a model is loaded."""
    from hfkit.evaluation import checks, harness

    if recipe.data is None and recipe.benchmarks is None:
        yield "data", "is missing; name the rows to evaluate on, or `benchmarks:`"
    if recipe.data is None and recipe.metrics is not None:
        yield "metrics", "have no rows to be taken on; name `data:`, or delete the key"
    if recipe.benchmarks is not None and recipe.task == "classify":
        yield "benchmarks", "are answered in words, which a classifier has not; evaluate it on `data:` alone"
    elif recipe.benchmarks is not None:
        yield from harness.problems(recipe.benchmarks)
    for index, name in enumerate(recipe.chosen):
        if name not in FITTING[recipe.task]:
            allowed = ", ".join(FITTING[recipe.task])
            yield f"metrics.{index}", f"{name} does not fit `task: {recipe.task}`; those that do: {allowed}"
    yield from checks.of_words(recipe.tokenize, recipe.chosen)
    problems = list(check_data(recipe, places["data"], recipes.get("data"))) if "data" in places else []
    models = {key: place for key, place in _models(places).items() if is_there(place, recipes.get(key))}
    for key, place in models.items() if not problems else ():
        problems += checks.of_model(recipe, key, place)
    yield from problems
    if not problems and "data" in places and is_there(places["data"], recipes.get("data")):
        yield from checks.of_rows(recipe, _rows(recipe, places), models)


def external(recipe: Recipe) -> dict[str, Any]:
    """The content of folders with tasks."""
    folders = [Path(name) for name in recipe.benchmarks or [] if Path(name).is_dir()]
    return {str(folder): manifest.digest_of(manifest.describe_files(folder)) for folder in folders}


def describe(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> dict[str, Any]:
    benchmarks = {"benchmarks": ", ".join(recipe.benchmarks)} if recipe.benchmarks else {}
    return ({"task": recipe.task, "metrics": ", ".join(recipe.chosen)} if recipe.data else {}) | benchmarks


def run(recipe: Recipe, places: dict[str, str], output: Path) -> dict[str, Any]:
    from transformers.utils import logging

    from hfkit.evaluation import checks
    from hfkit.evaluation.inputs import inputs_of

    # Everything that can be wrong with what is there now, before a model is loaded
    logging.disable_progress_bar()
    rows, models = _rows(recipe, places), _models(places)
    problems = [each for key, place in models.items() for each in checks.of_model(recipe, key, place)]
    problems += checks.of_rows(recipe, rows, models) if not problems else []
    if problems:
        raise HfkitError(*(f"{key}: {problem}" for key, problem in problems))
    inputs = {key: inputs_of(recipe, rows, place) for key, place in models.items()}

    # What the models make of it, and what that is worth
    outcomes = {key: _outcome(recipe, place, inputs[key]) for key, place in models.items()}
    return on_main("scores", lambda: _scores(recipe, rows, outcomes["model"], outcomes.get("against"), output))


class Outcome(NamedTuple):
    """What a model made of the rows: of each its prompt and its answer, and the (rows, 3) nats, tokens and bytes of
    what it was to say; none where that was not asked for. And of the benchmarks, see `harness.run`."""

    inputs: "Inputs"
    prompts: list[str]
    texts: list[str]
    sums: "np.ndarray"
    benchmarks: dict[str, Any]


def _models(places: dict[str, str]) -> dict[str, str]:
    return {key: place for key, place in places.items() if key != "data"}


def _rows(recipe: Recipe, places: dict[str, str]) -> list[dict[str, Any]]:
    if "data" not in places:
        return []
    rows = list(islice(corpus.rows(places["data"], recipe.split), recipe.limit))
    if not rows:
        raise HfkitError(f"data: the {recipe.split} split of {places['data']} has no rows; choose another split")
    return rows


def _outcome(recipe: Recipe, place: str, inputs: "Inputs") -> Outcome:
    """What a model makes of the rows and of the benchmarks. Call it on every process."""
    import numpy as np
    import torch

    from hfkit.evaluation import harness, likelihood
    from hfkit.evaluation.generation import write
    from hfkit.model.loading import load_model
    from hfkit.training import roof

    say(f"  {place}, a window of {inputs.window:,} tokens" + (f", {inputs.cut:,} prompts cut" if inputs.cut else ""))
    made = (manifest.read_json(Path(place)) or {}).get("recipe", {})
    model: Any = load_model(
        place, recipe.task, quantization=made.get("quantization"), trust_remote_code=recipe.trust_remote_code
    )
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    roof.use_all_cores(device)
    if getattr(model.config, "quantization_config", None) is None:
        model.to(device)

    tokenizer, batch_size = inputs.tokenizer, recipe.batch_size
    texts, sums, benchmarks = list[str](), np.zeros((0, 3)), dict[str, Any]()
    if recipe.task == "classify":
        texts = likelihood.classes(model, inputs.prompts, batch_size, tokenizer.pad_token_id)
    elif inputs.prompts:
        texts = write(model, tokenizer, inputs.prompts, batch_size, inputs.generation)
    if inputs.pieces is not None:
        sums = inputs.pieces.sums(model, batch_size, tokenizer)
    if recipe.benchmarks is not None:
        benchmarks = on_main("benchmarks", lambda: harness.run(recipe, model, tokenizer, inputs.window))
    shown = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in inputs.prompts]
    return Outcome(inputs, shown, texts, sums, benchmarks)


def _scores(
    recipe: Recipe, rows: list[dict[str, Any]], outcome: Outcome, other: Outcome | None, output: Path
) -> dict[str, Any]:
    """Scores, intervals and tests. They go to the screen, and the answers with theirs to a file."""
    from hfkit.evaluation import harness, report, scoring

    outcomes, asked = [outcome, other] if other else [outcome], rows if outcome.texts else []
    is_classes = recipe.task == "classify"
    references = [[str(row[recipe.label])] if is_classes else reference(recipe, row) for row in asked]
    labels = sorted({each[0] for each in references}.union(*(each.texts for each in outcomes)))
    found: list[dict[str, Any]] = [{} for _ in outcomes]
    if asked:
        found = [
            scoring.statistics(recipe.chosen, each.texts, references, labels, recipe.tokenize) for each in outcomes
        ]
    if outcome.inputs.pieces is not None:
        likelihoods = scoring.of_likelihood(recipe.chosen, [each.sums for each in outcomes])
        found = [of_texts | more for of_texts, more in zip(found, likelihoods, strict=True)]
    results: dict[str, Any] = {"rows": len(rows), "cut": outcome.inputs.cut, "window": outcome.inputs.window}
    results |= scoring.scores(*found)
    if other is not None and other.inputs.tokenizer.get_vocab() != outcome.inputs.tokenizer.get_vocab():
        say("  perplexity is per token, and the models have other tokens: it is not compared, bits_per_byte is")
        results = {name: value for name, value in results.items() if name not in NOT_COMPARED}
    if "f1" in recipe.chosen:
        results |= scoring.per_class(outcome.texts, references)
    results |= harness.scores(outcome.benchmarks, other.benchmarks if other else {})
    results["signatures"] = [each.signature for each in found[0].values()] + outcome.benchmarks.get("signatures", [])

    predictions = [
        {"prompt": prompt, "prediction": text, "references": several, "scores": values}
        for prompt, text, several, values in zip(
            outcome.prompts, outcome.texts, references, scoring.row_scores(found[0], len(asked)), strict=True
        )
    ]
    if predictions:
        scoring.write_predictions(output / "predictions.jsonl", predictions)
    say(report.screen(results, predictions))
    return results
