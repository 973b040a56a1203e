"""`hfkit plan`: everything that can be known without training, and the check of everything that can be checked."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from hfkit import graph, states

_WORDS = {
    "absent": "is not there yet: would run",
    "unfinished": "is unfinished: would go on",
    "finished": "up to date",
    "changed": "changed",
    "rejected": "misses its limits",
}


def show(path: Path, overrides: Sequence[str] = ()) -> None:
    """Print the graph with the state of each result, the sizes, and the resolved recipe.

    Raises:
        HfkitError: for whatever would stop the run.
    """
    node = graph.resolve(path, overrides)
    todo = states.what_runs(node)
    nodes = list(graph.in_order(node))
    width = max(len(str(each.source.path)) for each in nodes)
    print("\nRecipes, in the order in which they run")
    for each in nodes:
        state = todo.get(str(each.output_dir))
        words = _WORDS[state] if state else "up to date" if each.output_dir.exists() else "is gone, but not needed"
        print(f"  {each.recipe.stage:<10} {str(each.source.path):<{width}}  {each.output_dir}: {words}")
    for each in nodes:
        recipes = {key: value.recipe for key, value in each.inputs.items() if isinstance(value, graph.Node)}
        print(f"\n{each.recipe.stage}: {each.source.path}")
        for key, value in each.stage.describe(each.recipe, each.places(), recipes).items():
            print(f"  {key:<15} {value}")
    print(f"\nThe recipe {path}, resolved")
    resolved = {**node.recipe.model_dump(mode="json"), "output_dir": str(node.output_dir)}
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    print("\n".join(f"  {line}" for line in text.splitlines()))
    print("\nEverything was checked; nothing was changed.")
