"""What `serve` costs: it runs until it is stopped."""

from hfkit.planning.work import Known, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.serve import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    return {"server": f"{recipe.host}:{recipe.port}, {recipe.slots} answers at the same time"}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    return Work([], makes=None, notes=("it runs until it is stopped",))
