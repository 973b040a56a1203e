"""What `compare` costs."""

from hfkit.planning.work import Known, Model, Texts, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.compare import Recipe, distinct, names


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    return {"models": ", ".join(names(inputs)), "task": recipe.task, "metrics": ", ".join(recipe.scoring().metrics)}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.planning import parts
    from hfkit.planning.work import Chore

    texts = known["data"]
    models = {place: known[f"models.{index}"] for index, place in enumerate(recipe.models)}
    names = distinct([place.removesuffix(".yaml") for place in recipe.models])
    found = {name: model for name, model in zip(names, models.values(), strict=True) if isinstance(model, Model)}
    if len(found) < len(models) or not isinstance(texts, Texts):
        return parts.unknown(*(place for place, model in models.items() if not isinstance(model, Model)))
    scores = Chore("scores and intervals", parts.SCORING * len(found))
    return Work(
        [*parts.measuring(recipe.scoring(), found, texts), scores],
        disk=1e6,
        is_exact=parts.are_exact(texts, *(model.tokens for model in found.values())),
    )
