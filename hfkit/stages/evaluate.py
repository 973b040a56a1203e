"""Evaluate a model on a task: scores with their intervals, and a paired test against another model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json, Metrics
from hfkit.data.tasks.keys import TaskName
from hfkit.evaluation.settings import ScoredRecipe
from hfkit.recipe.fields import Input, ResolvedInputs
from hfkit.runtime.distributed import on_main, say

if TYPE_CHECKING:
    from hfkit.data.corpus import Row
    from hfkit.evaluation.outcomes import Outcome
    from hfkit.evaluation.settings import Scoring

NOT_COMPARED = ("perplexity_difference", "perplexity_difference_low", "perplexity_difference_high", "perplexity_p")


class Recipe(ScoredRecipe):
    """Scores of a model on data that it was not trained on."""

    MAKES: ClassVar[str] = "evaluation"
    DISTRIBUTED: ClassVar[bool] = True
    SUMMARY: ClassVar[str] = "The evaluation of a model."

    stage: Literal["evaluate"]
    model: Annotated[str, Input("model")]
    data: Annotated[str | None, Input("data set")] = pydantic.Field(
        None, description="What to evaluate on. Without it, the benchmarks are all."
    )
    against: Annotated[str | None, Input("model")] = pydantic.Field(
        None, description="Another model for the same task: each score is then tested against it, row by row."
    )
    task: TaskName = pydantic.Field(
        "generate", description="text: whole documents, by their likelihood. The others as in finetune."
    )
    benchmarks: list[str] | None = pydantic.Field(
        None, min_length=1, description="Tasks of lm-evaluation-harness, by name, or folders with YAML files of tasks."
    )

    def external_inputs(self) -> Json:
        """Return the content of folders with tasks."""
        paths = [Path(name).expanduser() for name in self.benchmarks or []]
        folders = [path for path in paths if path.is_dir()]
        return {str(folder): manifest.digest_of(manifest.describe_files(folder)) for folder in folders}


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a model is loaded."""
    from hfkit.evaluation import checks, harness

    if recipe.data is None and recipe.benchmarks is None:
        yield "data", "is missing; name the rows to evaluate on, or `benchmarks:`"
    if recipe.data is None and recipe.metrics is not None:
        yield "metrics", "have no rows to be taken on; name `data:`, or delete the key"
    scoring = recipe.scoring()
    if recipe.benchmarks is not None and scoring.task.has_classes:
        yield "benchmarks", "are answered in words, which a classifier has not; evaluate it on `data:` alone"
    elif recipe.benchmarks is not None:
        yield from harness.problems(recipe.benchmarks)
    yield from checks.of_scoring(scoring, inputs.get("data"), _models(inputs))


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from transformers.utils import logging

    from hfkit.data import corpus
    from hfkit.evaluation import checks, harness, outcomes
    from hfkit.evaluation.inputs import inputs_of
    from hfkit.model.loading import open_model

    # Everything that can be wrong with what is there now, before a model is loaded
    logging.disable_progress_bar()
    scoring, models = recipe.scoring(), {key: model.path for key, model in _models(inputs).items()}
    rows = corpus.read_split(inputs["data"].path, recipe.split, recipe.limit) if "data" in inputs else []
    checks.refuse(scoring, rows, models)
    prompts = {key: inputs_of(scoring, rows, path) for key, path in models.items()}

    # What the models make of it
    results, benchmarks = {}, {}
    for key, path in models.items():
        window, cut_count = prompts[key].window, prompts[key].cut
        say(f"  {path}, a window of {window:,} tokens" + (f", {cut_count:,} prompts cut" if cut_count else ""))
        model = open_model(path, scoring.task.has_classes, recipe.trust_remote_code)
        results[key] = outcomes.outcome_of(scoring, model, prompts[key])
        if recipe.benchmarks is not None:
            arguments = (recipe.benchmarks, scoring, model, prompts[key].tokenizer, window)
            benchmarks[key] = on_main("benchmarks", lambda: harness.run(*arguments))  # noqa: B023

    # What that is worth
    return on_main("scores", lambda: _scores(scoring, rows, results, benchmarks, output))


def _models(inputs: ResolvedInputs) -> ResolvedInputs:
    return {key: model for key, model in inputs.items() if key != "data"}


def _scores(
    scoring: "Scoring",
    rows: "list[Row]",
    model_outcomes: dict[str, "Outcome"],
    benchmarks: dict[str, Json],
    output: Path,
) -> Metrics:
    """Compute scores, intervals and tests. They go to the screen, and the answers with theirs to a file."""
    from hfkit.evaluation import harness, outcomes
    from hfkit.metrics.scoring import per_class, row_scores, scores, write_predictions
    from hfkit.reports import evaluation

    outcome, of_benchmarks = model_outcomes["model"], benchmarks.get("model", {})
    statistics = outcomes.statistics_of(scoring, rows, list(model_outcomes.values()))
    references = list(map(scoring.task.references, rows)) if outcome.texts else []
    results: dict[str, Any] = {"rows": len(rows), "cut": outcome.inputs.cut, "window": outcome.inputs.window}
    results |= scores(*statistics)
    if not outcomes.same_tokens(list(model_outcomes.values())):
        say("  perplexity is per token, and the models have other tokens: it is not compared, bits_per_byte is")
        results = {name: value for name, value in results.items() if name not in NOT_COMPARED}
    if "f1" in scoring.metrics:
        results |= per_class(outcome.texts, references)
    results |= harness.scores(of_benchmarks, benchmarks.get("against", {}))
    signatures = [statistic.signature for statistic in statistics[0].values()]
    results["signatures"] = signatures + of_benchmarks.get("signatures", [])

    predictions = [
        {"prompt": prompt, "prediction": text, "references": several, "scores": values}
        for prompt, text, several, values in zip(
            outcome.prompts, outcome.texts, references, row_scores(statistics[0], len(references)), strict=True
        )
    ]
    if predictions:
        write_predictions(output / "predictions.jsonl", predictions)
    say(evaluation.screen(results, predictions))
    return results
