"""Which results are up to date, and which must be made.

A folder is absent, unfinished (it holds `hfkit.started.json`), rejected (that file names limits that were missed) or
finished (`hfkit.json`). Both files say what it is made from: the recipe, the fingerprints of its inputs, and what the
stage says of the world outside (`external`).
"""

import json
from pathlib import Path
from typing import Literal

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json, Manifest
from hfkit.engine.graph import Node, in_order
from hfkit.errors import HfkitError, Rejected

State = Literal["absent", "unfinished", "rejected", "finished", "changed", "forced"]


def state_of(node: Node) -> tuple[State, list[str]]:
    """Return the state of a node's folder, and for a changed one the differences.

    Raises:
        HfkitError: if the folder holds something that hfkit did not make, or is damaged.
    """
    folder = node.output_dir
    finished = manifest.read_json(folder)
    started = manifest.read_json(folder, manifest.STARTED)
    record = finished or started
    if record is None:
        if folder.is_file() or (folder.is_dir() and any(path.suffix != manifest.PARTIAL for path in folder.iterdir())):
            raise HfkitError(f"{folder}: holds files that hfkit did not make; choose another output_dir=...")
        return "absent", []
    if record["stage"] != node.recipe.stage:
        raise HfkitError(
            f"{folder}: belongs to {record['name']} (stage {record['stage']}), not to {node.source.path}; "
            f"choose another output_dir=..."
        )
    differences = _differences(record["made_from"], node.made_from)
    differences += _changed_defaults(record, node, {line.partition(":")[0] for line in differences})
    for key, entry in record.get("inputs", {}).items():
        now = manifest.read_json(Path(entry["place"]))
        if not differences and now is not None and entry["digest"] not in (None, now["digest"]):
            differences.append(f"{key}: the content of {entry['place']} has changed")
    if differences and not finished and not record.get("committed") and not any(folder.glob("checkpoint-*")):
        return "absent", []  # stopped before there was anything to lose
    if differences:
        return "changed", differences
    if finished:
        manifest.check_whole(folder, finished)
        return "finished", []
    return "rejected" if "rejected" in record else "unfinished", []


def _differences(old: Json, new: Json) -> list[str]:
    """Return `train.max_steps: 600 -> 700` for each value that differs."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            kind, _, name = key.partition(".")
            if kind == "inputs":
                lines.append(f"{name}: made from something else now")
            else:
                lines.append(f"{name}: {before.get(key, 'default')} -> {after.get(key, 'default')}")
    return lines


def _changed_defaults(record: Manifest, node: Node, reported: set[str]) -> list[str]:
    """Return the keys that neither recipe sets, and whose default is another now. A new key changes nothing by its
    default."""
    skipped = {"output_dir", *(key.split(".")[0] for key in node.inputs)}
    now = _flat(json.loads(node.recipe.model_dump_json(exclude={"push", *skipped})))
    before = _flat({key: value for key, value in record.get("recipe", {}).items() if key not in skipped})
    return [
        f"{key}: the default was {before[key]}, and is {now[key]}"
        for key in sorted(before.keys() & now.keys() - reported)
        if before[key] != now[key]
    ]


def _flat(value: object, prefix: str = "") -> Json:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def what_runs(node: Node, rebuild: bool = False, fresh: bool = False, force: bool = False) -> dict[str, State]:
    """Return the folders that must be made, in order, each with its state now.

    Args:
        rebuild: make old results anew. What is `finished` or `changed` here is to be set aside.
        fresh: begin unfinished runs anew. They count as `changed`.
        force: go on from the checkpoints of unfinished runs that have changed. They count as `forced`.

    Raises:
        HfkitError: if finished or unfinished work would be overwritten.
        Rejected: if a result that is needed misses what its recipe accepts.
    """
    runs: dict[str, State] = {}
    problems: list[str] = []

    def visit(current: Node, is_target: bool) -> None:
        inputs = [value for value in current.inputs.values() if isinstance(value, Node)]
        is_finished = manifest.read_json(current.output_dir) is not None
        try:
            state, differences = state_of(current)
        except HfkitError as error:
            if not rebuild or not is_finished:
                problems.extend(error.problems)
            state, differences = "changed", []
        may_change = rebuild
        if state == "rejected":
            if not rebuild and not fresh:
                raise rejection(current, (manifest.read_json(current.output_dir, manifest.STARTED) or {})["rejected"])
            state, may_change = "changed", True
        if state in ("unfinished", "changed") and not is_finished and (fresh or force):
            may_change = True
            state = "changed" if fresh else "forced" if state == "changed" else state
        if state == "finished" and not (rebuild and is_target):
            # An input that is gone is not needed; one that has changed matters.
            inputs = [value for value in inputs if value.output_dir.exists() and state_of(value)[0] == "changed"]
        elif state != "changed" or may_change:
            runs[str(current.output_dir)] = state
        before = len(problems)
        for value in inputs:
            visit(value, False)
        if differences and not may_change and len(problems) == before:  # else they follow from what was told already
            problems.append(_refusal(current, differences, is_target, is_finished))

    visit(node, True)
    if problems:
        raise HfkitError(*dict.fromkeys(problems))
    folders = [str(current.output_dir) for current in in_order(node)]
    return {folder: runs[folder] for folder in folders if folder in runs}


def rejection(node: Node, violations: list[str]) -> Rejected:
    """Return the error of a model that its limits reject.

    Args:
        violations: the limits beside the values, as a table.
    """
    folder = node.output_dir
    lines = [
        f"{folder}: misses what {node.source.path} accepts. It is kept for inspection, but is not finished:",
        *(f"    {line}" for line in violations),
        "  Change the recipe or its limits and run it again. To continue anyway:",
        f"    --fresh  to set {folder} aside as {folder}.old1 and rebuild it",
    ]
    if node.recipe.MAKES != "evaluation":
        lines.append(f"    <key>={folder}  where it is an input, to use it anyway")
    return Rejected("\n".join(lines))


def _refusal(node: Node, differences: list[str], is_target: bool, is_finished: bool) -> str:
    folder = node.output_dir
    ways = []
    if is_target:
        ways.append("output_dir=...  to make the new result elsewhere")
    elif is_finished:
        ways.append(f"<key>={folder}  where it is an input, to use it as it is")
    if is_finished:
        ways.append(f"--rebuild  to set {folder} aside as {folder}.old1 and rebuild it")
    else:
        ways.append("--force  to resume from its checkpoints anyway")
        ways.append(f"--fresh  to set {folder} aside as {folder}.old1 and start over")
    return "\n".join(
        [
            f"{folder}: was made from a different recipe than {node.source.path} is now:",
            *(f"    {line}" for line in differences),
            "  Nothing was changed. Options:",
            *(f"    {way}" for way in ways),
        ]
    )
