"""What `hfkit plan` shows: a table of the recipes, what each costs by part, and warnings."""

import dataclasses
import importlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.engine import graph, states

if TYPE_CHECKING:
    from hfkit.planning.estimate import Costs, Estimate
    from hfkit.planning.work import Work

_WORDS = {
    "absent": "will run",
    "unfinished": "unfinished: will resume",
    "changed": "will be rebuilt",
    "forced": "will resume",
    "finished": "will be rebuilt",
}


@dataclasses.dataclass
class Planned:
    """A recipe that would run."""

    node: graph.Node
    work: "Work"
    estimate: "Estimate"


def planner(node: graph.Node) -> Any:
    """What says what a stage costs: the module of its name."""
    return importlib.import_module(f"hfkit.planning.stages.{node.recipe.stage}")


def print_table(
    nodes: list[graph.Node], todo: dict[str, states.State], planned: list[Planned], costs: "Costs | None"
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


def _numbers(each: Planned, costs: "Costs") -> tuple[float, ...]:
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


def _cells(each: Planned, costs: "Costs") -> list[str]:
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


def print_details(each: Planned) -> None:
    node, estimate = each.node, each.estimate
    lines: dict[str, Any] = dict(planner(node).describe(node.recipe, node.resolved()))
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


def warnings(planned: list[Planned], costs: "Costs", config: str | Path | None) -> Iterable[str]:
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


def _free_disk(planned: list[Planned]) -> float:
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
