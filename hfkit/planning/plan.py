"""`hfkit plan`: everything that can be known without training, and the check of everything that can be checked."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json
from hfkit.engine import graph, plans, states
from hfkit.errors import HfkitError
from hfkit.planning import process
from hfkit.planning.table import Planned, planner, print_details, print_table, warnings
from hfkit.recipe import yaml_source
from hfkit.recipe.fields import Input, marked
from hfkit.runtime import resources

if TYPE_CHECKING:
    from hfkit.planning.estimate import Costs, Estimate
    from hfkit.planning.machines import Machine, Prices, Spread
    from hfkit.planning.work import Known, Work


def plan(
    path: str | Path, overrides: Sequence[str] = (), on: str | None = None, config: str | Path | None = None
) -> None:
    """Print the graph with the state of each result, what each would take, and the resolved recipe.

    Args:
        on: a machine by name, such as h100x8. By default this one, whose speed is measured.
        config: path of an Accelerate configuration.

    Raises:
        HfkitError: for whatever would stop the run, and for a machine or a configuration that is none.
    """
    path = Path(path)
    if on is None:
        _warm_up(path, overrides)
    import pyarrow.parquet  # noqa: F401 what a run has loaded counts

    from hfkit.engine import runner  # noqa: F401

    node = graph.resolve(path, overrides)
    todo = states.what_runs(node)
    nodes = list(graph.in_order(node))
    loaded = resources.resident_memory() or 0  # what a run has loaded when it begins
    planned, costs = _estimated(nodes, todo, on, config, loaded)
    print("\nRecipes, in the order in which they run")
    print_table(nodes, todo, planned, costs)
    if costs is not None:
        for each in planned:
            print_details(each)
        for warning in warnings(planned, costs, config):
            print(f"\nWARNING: {warning}")
    print(f"\nThe recipe {path}, resolved")
    resolved = {**node.recipe.model_dump(mode="json"), "output_dir": str(node.output_dir)}
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    print("\n".join(f"  {line}" for line in text.splitlines()))
    print("\nEverything was checked; nothing was run.")


# ---- estimating


def _warm_up(path: Path, overrides: Sequence[str]) -> None:
    """Begin to load the libraries that models are measured with, where the recipe has to do with models and its result
    is not there."""
    with contextlib.suppress(HfkitError, ImportError):  # what is wrong with the recipe is told later, and whole
        values = yaml_source.read(path, overrides).values
        folder = Path(values.get("output_dir") or f"runs/{path.stem}")
        has_model = graph.load_stage(values["stage"]).Recipe.MAKES in ("model", "evaluation")
        if has_model and manifest.read_json(folder) is None:
            process.warm_up()


def _estimated(
    nodes: list[graph.Node], todo: dict[str, states.State], on: str | None, config: str | Path | None, loaded: int
) -> tuple[list[Planned], "Costs | None"]:
    """What would run, with what it takes; and on what. Nothing is measured where nothing would run."""
    from hfkit.planning import machines

    prices = machines.prices()
    named, spread = machines.named(on, prices) if on is not None else None, machines.spread_of(config)
    if named is not None and spread is not None and named.count > 1 and named.count != spread.processes:
        told = f"is {named.count} devices, and {config} starts {spread.processes} processes"
        raise HfkitError(f"--on {on}: {told}; name {named.name}x{spread.processes}, or another file")
    if not todo:
        return [], None
    known: dict[str, Known] = {}
    works = []
    for node in nodes:
        if str(node.output_dir) in todo:
            works.append(
                (node, planner(node).work(node.recipe, {key: _known(node, key, known) for key in node.inputs}))
            )
            known[str(node.output_dir)] = works[-1][1].makes
    costs = _costs(prices, named, spread, loaded, all(work.is_light for _, work in works))
    planned = [
        Planned(node, work, _estimate(_reached(costs if node.recipe.DISTRIBUTED else costs.of_one(), node), work))
        for node, work in works
    ]
    if named is None and (spread is None or spread.processes == 1):
        for each in planned:
            plans.keep(each.node, _as_kept(each, costs))
    return planned, costs


def _reached(costs: "Costs", node: graph.Node) -> "Costs":
    """The costs with the speed that the last run of the stage reached here."""
    from hfkit.planning import facts

    share = facts.reached(node.output_dir.parent, node.recipe.stage) if costs.machine.is_here else None
    return costs if share is None else dataclasses.replace(costs, reached=share)


def _estimate(costs: "Costs", work: "Work") -> "Estimate":
    if work.is_light:
        return costs.of_chores(work)
    from hfkit.planning.costs import of_models

    return of_models(costs, work)


def _costs(prices: "Prices", named: "Machine | None", spread: "Spread | None", loaded: int, is_light: bool) -> "Costs":
    from hfkit.planning import machines
    from hfkit.planning.estimate import OF_LIBRARIES, Costs, Speeds

    if named is None:
        speeds = Speeds(*process.speeds()) if not is_light else Speeds("fp32", 0.0, 1.0, loaded)
        machine = machines.here(prices, speeds.flops)
        count = 1 if machine.is_cpu else machine.count
    else:
        machine, count = named, named.count
        speeds = Speeds("fp32" if machine.is_cpu else "bf16", machine.flops, 0.0, OF_LIBRARIES)
    if spread is None:
        name = "data parallel" if count > 1 else "one process"
        spread = machines.Spread(count if not machine.is_cpu else 1, name)
    elif named is not None and not machine.is_cpu and named.count == 1:
        machine = dataclasses.replace(machine, count=spread.processes)
    return Costs(machine, spread, prices, speeds, loaded, prices.utilisation)


def _known(node: graph.Node, key: str, known: dict[str, "Known"]) -> "Known":
    """What is known of an input: what its recipe will make, or what stands there."""
    from hfkit.planning import facts

    value = node.inputs[key]
    if isinstance(value, graph.Node) and str(value.output_dir) in known:
        return known[str(value.output_dir)]
    place = str(value.output_dir) if isinstance(value, graph.Node) else value
    kind = marked(type(node.recipe), Input)[key.split(".")[0]].kind
    return facts.known_of(place, kind)


def _as_kept(each: Planned, costs: "Costs") -> Json:
    estimate, machine = each.estimate, costs.machine
    return {
        "seconds": round(estimate.seconds, 1),
        "peak_memory_bytes": round(estimate.peak),
        "disk_bytes": round(estimate.disk),
        "tokens": round(estimate.tokens),
        "steps": estimate.steps,
        "energy_kwh": estimate.energy(machine),
        "co2_kg": estimate.energy(machine) * costs.prices.grams_per_kwh / 1000,
        "dollars": estimate.dollars(machine, costs.prices),
    }
