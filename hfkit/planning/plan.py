"""`hfkit plan`: everything that can be known without training, and the check of everything that can be checked."""

import contextlib
import dataclasses
import importlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json
from hfkit.engine import graph, plans, states
from hfkit.errors import HfkitError
from hfkit.planning import process
from hfkit.recipe import yaml_source
from hfkit.recipe.fields import Input, marked
from hfkit.runtime import resources

if TYPE_CHECKING:
    from hfkit.planning.estimate import Costs, Estimate
    from hfkit.planning.machines import Machine, Prices, Spread
    from hfkit.planning.work import Known, Work

_WORDS = {
    "absent": "will run",
    "unfinished": "unfinished: will resume",
    "changed": "will be rebuilt",
    "forced": "will resume",
    "finished": "will be rebuilt",
}


@dataclasses.dataclass
class _Planned:
    """A recipe that would run."""

    node: graph.Node
    work: "Work"
    estimate: "Estimate"


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
    _print_table(nodes, todo, planned, costs)
    if costs is not None:
        for each in planned:
            _print_details(each)
        for warning in _warnings(planned, costs, config):
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
) -> tuple[list[_Planned], "Costs | None"]:
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
                (node, _planner(node).work(node.recipe, {key: _known(node, key, known) for key in node.inputs}))
            )
            known[str(node.output_dir)] = works[-1][1].makes
    costs = _costs(prices, named, spread, loaded, all(work.is_light for _, work in works))
    planned = [
        _Planned(node, work, _estimate(costs if node.recipe.DISTRIBUTED else costs.of_one(), work))
        for node, work in works
    ]
    if named is None and (spread is None or spread.processes == 1):
        for each in planned:
            plans.keep(each.node, _as_kept(each, costs))
    return planned, costs


def _estimate(costs: "Costs", work: "Work") -> "Estimate":
    if work.is_light:
        return costs.of_chores(work)
    from hfkit.planning.costs import of_models

    return of_models(costs, work)


def _planner(node: graph.Node) -> Any:
    """What says what a stage costs: the module of its name."""
    return importlib.import_module(f"hfkit.planning.stages.{node.recipe.stage}")


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
    return Costs(machine, spread, prices, speeds, loaded)


def _known(node: graph.Node, key: str, known: dict[str, "Known"]) -> "Known":
    """What is known of an input: what its recipe will make, or what stands there."""
    from hfkit.planning import facts

    value = node.inputs[key]
    if isinstance(value, graph.Node) and str(value.output_dir) in known:
        return known[str(value.output_dir)]
    place = str(value.output_dir) if isinstance(value, graph.Node) else value
    kind = marked(type(node.recipe), Input)[key.split(".")[0]].kind
    return facts.known_of(place, kind)


def _as_kept(each: _Planned, costs: "Costs") -> Json:
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


# ---- printing


def _print_table(
    nodes: list[graph.Node], todo: dict[str, states.State], planned: list[_Planned], costs: "Costs | None"
) -> None:
    of_node = {str(each.node.output_dir): each for each in planned}
    rows = [["", "", "", "", "time", "memory", "disk", "energy", "CO2", "money"]]
    for node in nodes:
        state = todo.get(str(node.output_dir))
        words = _WORDS[state] if state else "up to date" if node.output_dir.exists() else "missing (not needed)"
        row = [node.recipe.stage, str(node.source.path), str(node.output_dir), words]
        found = of_node.get(str(node.output_dir))
        rows.append([*row, *_cells(found, costs)] if found is not None and costs is not None else [*row, *[""] * 6])
    if costs is not None:
        start = costs.start_seconds
        total = [sum(column) for column in zip(*(_numbers(each, costs) for each in planned), strict=True)]
        most = max((each.estimate.peak for each in planned), default=0)
        cells = [_time(total[0] + start), _bytes(most), _bytes(total[2]), *_of_energy(*total[3:])]
        rows.append(["total", f"with {_time(start)} to start", "", "", *cells])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if at < 4 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
    if costs is not None:
        is_measured = all(each.estimate.is_measured for each in planned if each.estimate.steps)
        print(f"\n{costs.assumptions(is_measured)}")


def _numbers(each: _Planned, costs: "Costs") -> tuple[float, ...]:
    """Seconds, bytes of memory and of disk, kWh, kg of CO2, dollars."""
    kwh = each.estimate.energy(costs.machine)
    co2 = kwh * costs.prices.grams_per_kwh / 1000
    return (
        each.estimate.seconds,
        each.estimate.peak,
        each.estimate.disk,
        kwh,
        co2,
        each.estimate.dollars(costs.machine, costs.prices),
    )


def _cells(each: _Planned, costs: "Costs") -> list[str]:
    seconds, peak, disk, *of_energy = _numbers(each, costs)
    if not each.work.parts:
        return ["?", "?", "?", "", "", ""]
    about = "" if each.work.is_exact else "about "
    return [about + _time(seconds), _bytes(peak), _bytes(disk), *_of_energy(*of_energy)]


def _of_energy(kwh: float, co2: float, dollars: float) -> list[str]:
    energy = f"{kwh:,.1f} kWh" if kwh >= 1 else f"{kwh * 1000:,.2g} Wh" if kwh < 0.01 else f"{kwh * 1000:,.0f} Wh"
    return [
        energy,
        f"{co2:,.1f} kg" if co2 >= 1 else f"{co2 * 1000:,.2g} g",
        f"${dollars:,.2f}" if dollars >= 0.01 else "< 1 cent",
    ]


def _print_details(each: _Planned) -> None:
    node, estimate = each.node, each.estimate
    lines: dict[str, Any] = dict(_planner(node).describe(node.recipe, node.resolved()))
    about = "" if each.work.is_exact else "about "
    if estimate.steps:
        share = "all trained" if estimate.trained == estimate.parameters else f"{estimate.trained:,} trained"
        lines["parameters"] = f"{estimate.parameters:,}, {share}"
        a_step = estimate.tokens / estimate.steps
        is_told = (getattr(node.recipe, "train", None) or {}).get("max_steps", -1) > 0
        steps = f"{estimate.steps:,}" if is_told else f"{about}{estimate.steps:,}"
        lines["tokens"] = f"{estimate.tokens:,.0f} in {steps} steps of {a_step:,.0f}"
    if estimate.flops:
        lines["FLOPs"] = f"{estimate.flops:.2g}"
    if each.work.parts:
        parts = sorted(estimate.memory.items(), key=lambda part: -part[1])
        lines["memory"] = f"{_bytes(estimate.peak)}: " + ", ".join(
            f"{name} {_bytes(size)}" for name, size in parts if size >= 5e4
        )
        spent = sorted(estimate.spent.items(), key=lambda part: -part[1])
        lines["time"] = ", ".join(f"{what} {_time(seconds)}" for what, seconds in spent if seconds >= 0.05)
    print(f"\n{node.recipe.stage}: {node.source.path}")
    for key, value in lines.items():
        print(f"  {key:<15} {value}")
    for note in each.work.notes:
        print(f"  {'not known':<15} {note}")


def _warnings(planned: list[_Planned], costs: "Costs", config: str | Path | None) -> Iterable[str]:
    machine, free = costs.machine, _free_disk(planned)
    if config is not None and costs.spread.wants_gpus and machine.is_cpu:
        yield f"{config} is for GPUs, and here are none: add --on h100x{costs.spread.processes} to see it on some"
    for each in planned:
        needed, change = costs.needed(each.estimate), each.estimate.change
        if needed > machine.memory or change != "":
            way = (
                f"It fits with: {change}"
                if change
                else "No single change of the recipe makes it fit; take a larger machine"
            )
            has = f"{machine.name} has {_bytes(machine.memory)}"
            yield f"{each.node.source.path}: needs {_bytes(needed)} of memory, and {has}. {way}"
    disk = sum(each.estimate.disk for each in planned)
    if machine.is_here and disk > free:
        room = f"{_bytes(free)} are free; make room, or choose another output_dir=..."
        yield f"the results take {_bytes(disk)}, and {room}"


def _free_disk(planned: list[_Planned]) -> float:
    folder = planned[-1].node.output_dir.absolute() if planned else Path.cwd()
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _bytes(size: float) -> str:
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= least:
            return f"{size / least:,.1f} {unit}" if size < 100 * least else f"{size / least:,.0f} {unit}"
    return f"{size / 1e3:,.0f} kB"
