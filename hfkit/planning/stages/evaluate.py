"""What `evaluate` costs."""

from hfkit.planning.work import Known, Model, Texts, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.evaluate import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    benchmarks = {"benchmarks": ", ".join(recipe.benchmarks)} if recipe.benchmarks else {}
    return ({"task": recipe.task, "metrics": ", ".join(recipe.scoring().metrics)} if recipe.data else {}) | benchmarks


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.planning import parts
    from hfkit.planning.work import Chore

    texts = known.get("data")
    models = {key: model for key, model in known.items() if key != "data"}
    if not all(isinstance(model, Model) for model in models.values()):
        return parts.unknown(*filter(None, (recipe.model, recipe.against)))
    notes = ("benchmarks are not counted",) if recipe.benchmarks else ()
    if not isinstance(texts, Texts):
        return Work([], notes=notes or ("how much data there is is not known here",), is_exact=False)
    scoring = recipe.scoring()
    reads = [
        part for model in models.values() if isinstance(model, Model) for part in parts.scored(scoring, model, texts)
    ]
    rows = min(texts.rows[recipe.split], recipe.limit or texts.rows[recipe.split])
    seconds = parts.SCORING + rows * len(scoring.metrics) * parts.SCORING_A_ROW
    scores = Chore("scores and intervals", seconds, 6e7)
    return Work([*reads, scores], disk=rows * 2000.0, notes=notes, is_exact=texts.is_exact)
