"""Compare models: quality, size, memory and speed side by side, and which of them nothing dominates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from hfkit.errors import refuse
from hfkit.evaluation import accept
from hfkit.evaluation.accept import Accept
from hfkit.evaluation.settings import ScoredRecipe
from hfkit.planning.work import Known, Model, Texts, Work
from hfkit.ranks import say
from hfkit.recipe import Input, StageRecipe

MAKES, DISTRIBUTED = "evaluation", False


class Recipe(ScoredRecipe):
    """Several models on the same rows, in one run on one machine."""

    stage: Literal["compare"]
    models: Annotated[list[str], Input("model")] = pydantic.Field(
        min_length=2, description="Recipes, folders or ids on the Hub. The first is what the others are compared with."
    )
    data: Annotated[str, Input("data set")]
    prompts: list[Annotated[str, pydantic.Field(min_length=1)]] | None = pydantic.Field(
        None, min_length=1, description="Texts that every model goes on with. By default those of the first rows."
    )
    accept: Accept = {}


def check(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Iterator[tuple[str, str]]:
    """What can be known before a model is loaded."""
    from hfkit.evaluation import checks

    models = _models(places)
    folders = [Path(place).resolve() for place in models.values()]  # of an id on the Hub it is none, but as good
    for index, (key, place) in enumerate(models.items()):
        if folders[index] in folders[:index]:
            yield key, f"{place}: is named twice; delete one"
    yield from checks.of_quality(recipe)
    problems = list(checks.of_scoring(recipe, places, recipes, models))
    yield from problems
    known = checks.measured(recipe, places, recipes)
    yield from accept.problems(recipe.accept, known, known, "the first model")
    if (asked := _key_of_perplexity(recipe)) and not problems:
        yield from checks.of_tokens(models, recipes, asked)


def external(recipe: Recipe) -> dict[str, Any]:
    return {}


def describe(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> dict[str, Any]:
    return {"models": ", ".join(_names(places)), "task": recipe.task, "metrics": ", ".join(recipe.chosen)}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.planning import parts
    from hfkit.planning.work import Chore

    texts = known["data"]
    models = {place: known[f"models.{index}"] for index, place in enumerate(recipe.models)}
    names = _distinct([place.removesuffix(".yaml") for place in recipe.models])
    found = {name: model for name, model in zip(names, models.values(), strict=True) if isinstance(model, Model)}
    if len(found) < len(models) or not isinstance(texts, Texts):
        return parts.unknown(*(place for place, model in models.items() if not isinstance(model, Model)))
    scores = Chore("scores and intervals", parts.SCORING * len(found))
    return Work(
        [*parts.measuring(recipe, found, texts), scores],
        disk=1e6,
        is_exact=parts.are_exact(texts, *(model.tokens for model in found.values())),
    )


def run(recipe: Recipe, places: dict[str, str], output: Path) -> dict[str, Any]:
    from hfkit import manifest
    from hfkit.evaluation import checks, comparison, comparison_report, outcomes

    # Everything that can be wrong with what is there now, before a model is loaded
    rows = outcomes.rows_of(recipe, places["data"])
    checks.refuse(recipe, rows, _models(places))
    if asked := _key_of_perplexity(recipe):
        refuse(checks.of_tokens(_models(places), {}, asked))

    # The models, one after the other
    found = comparison.compared(recipe, rows, _names(places), recipe.prompts)
    base = found["models"][0]
    limits = [
        each for row in found["models"][1:] for each in accept.judged(recipe.accept, row, base, name=row["name"])
    ]

    # The report
    title = f"{len(found['models'])} models, {recipe.split} split of {places['data']}"
    manifest.write_json(output / "report.json", found)
    (output / "report.md").write_text(comparison_report.markdown(found, title), encoding="utf-8")
    (output / "report.html").write_text(comparison_report.page(found, title), encoding="utf-8")
    say(comparison_report.screen(found))
    say(
        f"  nothing dominates {', '.join(found['undominated'])}; report.md, report.html and report.json are the report"
    )
    return {**found, "models": _flat(found), "accept": limits}


def _key_of_perplexity(recipe: Recipe) -> str | None:
    """The key that asks for a comparison by it, which models of different tokens cannot have."""
    if recipe.metrics is not None and "perplexity" in recipe.metrics:
        return f"metrics.{recipe.metrics.index('perplexity')}"
    return "accept.perplexity" if "perplexity" in recipe.accept else None


def _models(places: dict[str, str]) -> dict[str, str]:
    return {key: place for key, place in places.items() if key.startswith("models.")}


def _names(places: dict[str, str]) -> dict[str, str]:
    """The models by names that tell them apart: the last part of the place, where that is enough."""
    found = list(_models(places).values())
    return dict(zip(_distinct(found), found, strict=True))


def _distinct(places: list[str]) -> list[str]:
    short = [Path(place).name for place in places]
    return [name if short.count(name) == 1 else place for name, place in zip(short, places, strict=True)]


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of each model under its name."""
    left_out = ("name", "samples")
    return {row["name"]: {key: row[key] for key in row if key not in left_out} for row in found["models"]}
