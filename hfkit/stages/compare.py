"""Compare models: quality, size, memory and speed side by side, and which of them nothing dominates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic

from hfkit.artifacts.manifest import Json, Metrics
from hfkit.errors import refuse
from hfkit.evaluation.settings import ScoredRecipe
from hfkit.recipe import limits
from hfkit.recipe.fields import Input, ResolvedInputs
from hfkit.recipe.limits import Accept
from hfkit.runtime.distributed import say


class Recipe(ScoredRecipe):
    """Several models on the same rows, in one run on one machine."""

    MAKES: ClassVar[str] = "evaluation"
    DISTRIBUTED: ClassVar[bool] = False
    SUMMARY: ClassVar[str] = "A comparison of models."

    stage: Literal["compare"]
    models: Annotated[list[str], Input("model")] = pydantic.Field(
        min_length=2, description="Recipes, folders or ids on the Hub. The first is what the others are compared with."
    )
    data: Annotated[str, Input("data set")]
    prompts: list[Annotated[str, pydantic.Field(min_length=1)]] | None = pydantic.Field(
        None, min_length=1, description="Texts that every model goes on with. By default those of the first rows."
    )
    accept: Accept = {}


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a model is loaded."""
    from hfkit.evaluation import checks

    scoring, models = recipe.scoring(), _models(inputs)
    folders = [Path(model.path).resolve() for model in models.values()]  # of an id on the Hub it is none, but as good
    for index, (key, model) in enumerate(models.items()):
        if folders[index] in folders[:index]:
            yield key, f"{model.path}: is named twice; delete one"
    yield from checks.of_quality(scoring)
    problems = list(checks.of_scoring(scoring, inputs["data"], models))
    yield from problems
    allowed = checks.measured(scoring, inputs["data"])
    yield from limits.problems(recipe.accept, allowed, allowed, "the first model")
    if (perplexity_key := _key_of_perplexity(recipe)) and not problems:
        yield from checks.of_tokens(models, perplexity_key)


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from hfkit.artifacts import manifest
    from hfkit.data import corpus
    from hfkit.evaluation import checks, comparison
    from hfkit.reports import comparison as report

    # Everything that can be wrong with what is there now, before a model is loaded
    scoring, models = recipe.scoring(), _models(inputs)
    rows = corpus.read_split(inputs["data"].path, recipe.split, recipe.limit)
    checks.refuse(scoring, rows, {key: model.path for key, model in models.items()})
    if perplexity_key := _key_of_perplexity(recipe):
        refuse(checks.of_tokens(models, perplexity_key))

    # The models, one after the other
    result = comparison.compared(scoring, rows, names(inputs), recipe.prompts)
    base = result["models"][0]
    verdicts = [
        verdict
        for row in result["models"][1:]
        for verdict in limits.judged(recipe.accept, row, base, name=row["name"])
    ]

    # The report
    title = f"{len(result['models'])} models, {recipe.split} split of {inputs['data'].path}"
    manifest.write_json(output / "report.json", result)
    (output / "report.md").write_text(report.markdown(result, title), encoding="utf-8")
    (output / "report.html").write_text(report.page(result, title), encoding="utf-8")
    say(report.screen(result))
    say(f"  Pareto-optimal: {', '.join(result['undominated'])}; report.md, report.html and report.json are the report")
    return {**result, "models": _flat(result), "accept": verdicts}


def _key_of_perplexity(recipe: Recipe) -> str | None:
    """Return the key that asks for a comparison by perplexity, which models of different tokens cannot have."""
    if recipe.metrics is not None and "perplexity" in recipe.metrics:
        return f"metrics.{recipe.metrics.index('perplexity')}"
    return "accept.perplexity" if "perplexity" in recipe.accept else None


def _models(inputs: ResolvedInputs) -> ResolvedInputs:
    return {key: model for key, model in inputs.items() if key.startswith("models.")}


def names(inputs: ResolvedInputs) -> dict[str, str]:
    """Return the models by names that tell them apart: the last part of the path, where that is enough."""
    paths = [model.path for model in _models(inputs).values()]
    return dict(zip(distinct(paths), paths, strict=True))


def distinct(paths: list[str]) -> list[str]:
    short = [Path(path).name for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def _flat(result: Json) -> Json:
    """Return the numbers of each model under its name."""
    left_out = ("name", "samples")
    return {row["name"]: {key: row[key] for key in row if key not in left_out} for row in result["models"]}
