"""Running a recipe: first the recipes it needs, each into a folder that appears whole or not at all."""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfkit.artifacts import lineage, manifest
from hfkit.artifacts.manifest import Json, Manifest, Metrics
from hfkit.engine import graph, plans, states
from hfkit.errors import HfkitError
from hfkit.privacy.secrets import without_secrets
from hfkit.recipe.limits import table
from hfkit.recipe.yaml_source import Source
from hfkit.reports.card import write_card
from hfkit.runtime import resources
from hfkit.runtime.cores import usable_cores
from hfkit.runtime.distributed import is_main, on_main, say


def run(recipe: str | Path | Source, overrides: Sequence[str] = (), **ways: bool) -> None:
    """Run a recipe, after those it needs that are not up to date. Call it on every process.

    Args:
        recipe: the path of a file, or a recipe that was read already.
        overrides: such as `train.max_steps=10`.
        ways: what to do where a folder holds something else: `rebuild`, `fresh` and `force` of `states.what_runs`.

    Raises:
        HfkitError: for a mistake in a recipe or an input, before anything is changed.
    """
    target = graph.resolve(recipe if isinstance(recipe, Source) else Path(recipe), overrides)
    if target.recipe.ENDS:
        _run(target, **ways)
        return
    run_inputs(target, **ways)
    say(f"\n== {target.recipe.stage}: {target.source.path} -> {target.output_dir}")
    target.stage.run(target.recipe, target.resolved(), target.output_dir)


def run_inputs(target: graph.Node, **ways: bool) -> None:
    """Run what a recipe needs and is not up to date."""
    for node in target.inputs.values():
        if isinstance(node, graph.Node):
            _run(node, **ways)


def _run(target: graph.Node, **ways: bool) -> None:
    """Run the recipes of a graph that are not up to date."""
    todo = on_main("plan", lambda: states.what_runs(target, **ways))
    on_main("token", lambda: _refuse_push(target, todo))
    if not todo:
        say(f"{target.output_dir} is up to date with {target.source.path}: nothing to do.")
    for node in graph.in_order(target):
        folder = node.output_dir
        if str(folder) not in todo:
            if node is target:
                on_main(f"push {folder}", lambda node=node: _push(node))  # type: ignore[misc]
            if is_main() and (folder / manifest.STARTED).exists():  # killed while tidying
                with manifest.locked(folder):
                    _tidy(folder)
            continue
        say(f"\n== {node.recipe.stage}: {node.source.path} -> {folder}")
        if not node.recipe.DISTRIBUTED:
            on_main(f"run {folder}", lambda node=node: _make(node))  # type: ignore[misc]
            on_main(f"push {folder}", lambda node=node: _push(node))  # type: ignore[misc]
            continue
        with manifest.locked(folder) if is_main() else contextlib.nullcontext():
            start = time.time()
            on_main(f"start {folder}", lambda node=node: _start(node, todo))  # type: ignore[misc]
            try:
                with resources.metered() as usage:
                    metrics = node.stage.run(node.recipe, node.resolved(), folder)
            except HfkitError:
                if is_main():
                    _give_up(folder)
                raise
            costs = {"seconds": round(time.time() - start, 1), "usage": usage}
            violations = on_main(f"finish {folder}", lambda: _finish(node, folder, metrics, costs))  # noqa: B023 called here
        _reject(node, violations)
        on_main(f"push {folder}", lambda node=node: _push(node))  # type: ignore[misc]


def _refuse_push(target: graph.Node, todo: dict[str, states.State]) -> None:
    """Raise an error before a run of hours where there is no token to push with."""
    if any(getattr(node.recipe, "push", None) for node in graph.in_order(target) if str(node.output_dir) in todo):
        from hfkit.hub import push

        push.token()


def _push(node: graph.Node) -> None:
    """Push a finished folder where its recipe asks for it. It is finished, whatever becomes of the push."""
    settings = getattr(node.recipe, "push", None)
    if settings is None:
        return
    from hfkit.hub import push

    target = (settings.repo, settings.private, settings.revision)
    try:
        say(f"  {push.push(node.output_dir, *target)}")
    except Exception as error:
        message = str(error) if isinstance(error, HfkitError) else f"{type(error).__name__}: {error}"
        say(f"  WARNING: {without_secrets(message)}")
        say(
            f"  {node.output_dir} is finished, but not pushed. Push it later: {push.command(node.output_dir, *target)}"
        )


def _make(node: graph.Node) -> None:
    """Run a stage of one process in a temporary folder that is renamed at the end."""
    start = time.time()
    with manifest.locked(node.output_dir), manifest.new_folder(node.output_dir) as work:
        with resources.metered() as usage:
            metrics = node.stage.run(node.recipe, node.resolved(), work)
        violations = _finish(node, work, metrics, {"seconds": round(time.time() - start, 1), "usage": usage})
    _reject(node, violations)


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
        record: dict[str, Any] = {key: old[key] for key in ("run_id", "committed") if key in old}
        manifest.write_json(folder / manifest.STARTED, {**_content(node), **record, "forced_from": admitted})
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


def _finish(node: graph.Node, folder: Path, metrics: Metrics, costs: Json) -> list[str]:
    """Write the numbers and the card, then `hfkit.json`, which makes the folder finished.

    Args:
        costs: `seconds` and `usage`, which stand beside what was planned.

    Returns:
        The limits that the result misses, if it does, as a table. Then the folder stays unfinished.
    """
    content = {**_content(node), **costs, "planned": plans.kept(node), "metrics": metrics}
    manifest.write_json(folder / "metrics.json", metrics)
    write_card(folder, content)
    verdicts = metrics.get("accept", [])
    if all(verdict["kept"] for verdict in verdicts):
        manifest.finish(folder, content)
        _tidy(folder)
        return []
    violations = table(verdicts)
    started = manifest.read_json(folder, manifest.STARTED) or _content(node)
    manifest.write_json(folder / manifest.STARTED, {**started, "rejected": violations})
    return violations


def _reject(node: graph.Node, violations: list[str]) -> None:
    if violations:
        raise states.rejection(node, violations)


def _tidy(folder: Path) -> None:
    """Remove from a finished folder what served to resume."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    manifest.sweep(folder)
    (folder / manifest.STARTED).unlink(missing_ok=True)


def _content(node: graph.Node) -> Manifest:
    """Return what a manifest says of how the folder is made."""
    of_folders = node.made_from["inputs"]  # where hfkit did not make them, it is the digest of their files
    inputs = {key: lineage.record(resolved.path, of_folders.get(key)) for key, resolved in node.resolved().items()}
    return {
        "name": node.source.path.stem,
        "folder": str(node.output_dir),
        "stage": node.recipe.stage,
        "makes": node.recipe.MAKES,
        "summary": node.recipe.SUMMARY,
        "hardware": {"cpu_count": usable_cores()},
        "recipe": json.loads(node.recipe.model_dump_json(exclude={"push"})),
        "inputs": inputs,
        "made_from": node.made_from,
        "fingerprint": node.fingerprint,
    }
