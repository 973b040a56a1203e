"""Running a recipe: first the recipes it needs, each into a folder that appears whole or not at all."""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfkit import graph, manifest, states
from hfkit.errors import HfkitError
from hfkit.evaluation import accept
from hfkit.hub.card import write_card
from hfkit.ranks import is_main, on_main, say


def run(path: Path, overrides: Sequence[str] = (), **ways: bool) -> None:
    """Run the recipe at `path`, after those it needs that are not up to date. Call it on every process.

    `ways` are the ways on where a folder holds something else: `rebuild`, `fresh` and `force` of `states.what_runs`.

    Raises:
        HfkitError: for a mistake in a recipe or an input, before anything is changed.
    """
    target = graph.resolve(path, overrides)
    todo = on_main("plan", lambda: states.what_runs(target, **ways))
    if not todo:
        say(f"{target.output_dir} is up to date with {path}: nothing to do.")
    for node in graph.in_order(target):
        folder = node.output_dir
        if str(folder) not in todo:
            if is_main() and (folder / manifest.STARTED).exists():  # killed while tidying
                with manifest.locked(folder):
                    _tidy(folder)
            continue
        say(f"\n== {node.recipe.stage}: {node.source.path} -> {folder}")
        if not node.stage.DISTRIBUTED:
            on_main(f"run {folder}", lambda node=node: _make(node))  # type: ignore[misc]
            continue
        with manifest.locked(folder) if is_main() else contextlib.nullcontext():
            begun = time.time()
            on_main(f"start {folder}", lambda node=node: _start(node, todo))  # type: ignore[misc]
            try:
                metrics = node.stage.run(node.recipe, node.places(), folder)
            except HfkitError:
                if is_main():
                    _give_up(folder)
                raise
            missed = on_main(f"finish {folder}", lambda: _finish(node, folder, metrics, begun))  # noqa: B023 called here
        _reject(node, missed)


def _make(node: graph.Node) -> None:
    """Run a stage of one process in a temporary folder that is renamed at the end."""
    begun = time.time()
    with manifest.locked(node.output_dir), manifest.new_folder(node.output_dir) as work:
        metrics = node.stage.run(node.recipe, node.places(), work)
        missed = _finish(node, work, metrics, begun)
    _reject(node, missed)


def _start(node: graph.Node, todo: dict[str, states.State]) -> None:
    """Mark the folder of a stage that keeps its checkpoints there as unfinished."""
    folder = node.output_dir
    state, old = todo[str(folder)], manifest.read_json(folder, manifest.STARTED) or {}
    if state in ("finished", "changed") or (state == "absent" and "rejected" in old):
        manifest.set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest.sweep(folder)
    if state == "forced":
        admitted = [*old.get("forced_from", []), old.get("fingerprint")]
        kept: dict[str, Any] = {key: old[key] for key in ("run_id", "committed") if key in old}
        manifest.write_json(folder / manifest.STARTED, {**_content(node), **kept, "forced_from": admitted})
    elif state != "unfinished":
        manifest.write_json(folder / manifest.STARTED, _content(node))


def _give_up(folder: Path) -> None:
    """Take away what is left of a run that ended before there was anything to go on from."""
    started = manifest.read_json(folder, manifest.STARTED) or {}
    if started.get("committed") or any(folder.glob("checkpoint-*")):
        return
    manifest.sweep(folder)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    if {path.name for path in folder.iterdir()} <= {manifest.STARTED}:
        shutil.rmtree(folder)


def _finish(node: graph.Node, folder: Path, metrics: dict[str, Any], begun: float) -> list[str]:
    """Write the numbers and the card, then `hfkit.json`, which makes the folder finished.

    Returns:
        The limits that the result misses, if it does, as a table. Then the folder stays unfinished.
    """
    content = {**_content(node), "seconds": round(time.time() - begun, 1), "metrics": metrics}
    manifest.write_json(folder / "metrics.json", metrics)
    write_card(folder, content)
    limits = metrics.get("accept", [])
    if all(each["kept"] for each in limits):
        manifest.finish(folder, content)
        _tidy(folder)
        return []
    missed = accept.table(limits)
    started = manifest.read_json(folder, manifest.STARTED) or _content(node)
    manifest.write_json(folder / manifest.STARTED, {**started, "rejected": missed})
    return missed


def _reject(node: graph.Node, missed: list[str]) -> None:
    if missed:
        raise states.rejection(node, missed)


def _tidy(folder: Path) -> None:
    """Remove from a finished folder what served to resume."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    manifest.sweep(folder)
    (folder / manifest.STARTED).unlink(missing_ok=True)


def _content(node: graph.Node) -> dict[str, Any]:
    """What a manifest says of how the folder is made."""
    inputs = {}
    for key, place in node.places().items():
        made = manifest.read_json(Path(place)) or {}
        inputs[key] = {"place": place, "stage": made.get("stage"), "digest": made.get("digest")}
    return {
        "name": node.source.path.stem,
        "folder": str(node.output_dir),
        "stage": node.recipe.stage,
        "recipe": json.loads(node.recipe.model_dump_json(exclude={"push"})),
        "inputs": inputs,
        "made_from": node.made_from,
        "fingerprint": node.fingerprint,
    }
