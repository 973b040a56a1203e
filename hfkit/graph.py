"""Which recipes must run first, which results are up to date, and running what remains.

A folder is absent, unfinished (it holds `hfkit.started.json`) or finished (`hfkit.json`). Both files say what it is
made from: the recipe, the fingerprints of its inputs, and what the stage says of the world outside (`external`).
"""

import dataclasses
import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from hfkit import manifest, recipe_yaml, stages
from hfkit.errors import HfkitError, did_you_mean
from hfkit.recipe import Input, StageRecipe, marked, validate

State = Literal["absent", "unfinished", "finished", "changed", "forced"]
_HUB_ID = re.compile(r"(?!runs/)[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass
class Node:
    """One recipe of the graph, checked, with what it needs."""

    source: recipe_yaml.Source
    stage: ModuleType
    recipe: StageRecipe
    inputs: dict[str, "Node | str"]  # key -> the recipe that makes it, or a folder or Hub id as it was written
    made_from: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output_dir or f"runs/{self.source.path.stem}")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()

    def places(self) -> dict[str, str]:
        """Where each input lies: a folder, or an id on the Hub."""
        return {key: str(value.output_dir) if isinstance(value, Node) else value for key, value in self.inputs.items()}


def stage_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(stages.__path__)]


def load_stage(name: str) -> ModuleType:
    return importlib.import_module(f"hfkit.stages.{name}")


# ---- reading and checking the graph


def resolve(path: Path, overrides: Sequence[str] = ()) -> Node:
    """The graph that ends in the recipe at `path`, with every recipe of it read and checked.

    Raises:
        HfkitError: with every mistake of every recipe.
    """
    problems: list[str] = []
    node = _resolve(path, overrides, {}, [], problems)
    if problems or node is None:
        raise HfkitError(*dict.fromkeys(problems))
    folders: dict[Path, Path] = {}
    for each in in_order(node):
        other = folders.setdefault(each.output_dir.resolve(), each.source.path)
        if other != each.source.path:
            raise HfkitError(f"{each.source.path}: output_dir={each.output_dir}: {other} writes there too; change one")
    return node


def _resolve(
    path: Path, overrides: Sequence[str], known: dict[Path, Node | None], above: list[Path], problems: list[str]
) -> Node | None:
    place = path.resolve()
    if place in above:
        chain = " -> ".join(item.name for item in [*above[above.index(place) :], place])
        problems.append(f"{path}: needs its own result ({chain}); name a folder instead of one of these recipes")
        return None
    if place not in known:
        known[place] = None
        try:
            source = recipe_yaml.read(path, overrides)
            name = source.values["stage"]
            if name not in stage_names():
                hint = did_you_mean(name, stage_names())
                raise HfkitError(source.problem(("stage",), f"there is no stage {name!r}, {hint}"))
            stage = load_stage(name)
            before = len(problems)
            inputs = _resolve_inputs(source, stage.Recipe, known, [*above, place], problems)
            node = Node(source, stage, validate(source, stage.Recipe), inputs)
            if len(problems) == before:
                _check(node)
                node.made_from = _made_from(node)
                known[place] = node
        except HfkitError as error:
            problems.extend(error.problems)
    return known[place]


def _resolve_inputs(
    source: recipe_yaml.Source,
    recipe_class: type[StageRecipe],
    known: dict[Path, Node | None],
    above: list[Path],
    problems: list[str],
) -> dict[str, Node | str]:
    """Each input that the recipe names: the recipe behind it where it is one, else the folder or id as written."""
    inputs: dict[str, Node | str] = {}
    for key, marker in marked(recipe_class, Input).items():
        value = source.values.get(key)
        if not isinstance(value, str):
            continue
        if value.endswith((".yaml", ".yml")):
            beside = source.path.parent / value
            place = beside if beside.exists() else Path(value)
            if not place.exists():
                rule = f"there is no such recipe, neither in {source.path.parent} nor here; write it, or name a folder"
                problems.append(source.problem((key,), f"{value}: {rule}"))
            needed = _resolve(place, (), known, above, problems) if place.exists() else None
            if needed is None:
                continue
            inputs[key], kind = needed, needed.stage.MAKES
        else:
            made = manifest.read_json(Path(value))
            inputs[key], kind = value, load_stage(made["stage"]).MAKES if made else marker.kind
            if not Path(value).exists() and not _HUB_ID.fullmatch(value):
                rule = "there is no such folder; name a folder, a recipe (x.yaml) or an id on the Hub"
                problems.append(source.problem((key,), f"{value}: {rule}"))
        if kind != marker.kind:
            problems.append(source.problem((key,), f"{value}: is a {kind}, but {key} must be a {marker.kind}"))
    return inputs


def _check(node: Node) -> None:
    """What the stage itself checks: one setting against another, and against what the inputs are known to be."""
    recipes = {key: value.recipe for key, value in node.inputs.items() if isinstance(value, Node)}
    found = node.stage.check(node.recipe, node.places(), recipes)
    problems = [node.source.problem(tuple(map(_part, key.split("."))), text) for key, text in found]
    if problems:
        raise HfkitError(*problems)


def _part(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _made_from(node: Node) -> dict[str, Any]:
    """What the result depends on: compared with what a folder on disk was made from."""
    written = node.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir", *node.inputs})
    fingerprints = {}
    for key, value in node.inputs.items():
        if isinstance(value, Node):
            fingerprints[key] = value.fingerprint
        else:
            made = manifest.read_json(Path(value)) if Path(value).is_dir() else {}
            folder = made or {"fingerprint": manifest.digest_of(manifest.describe_files(Path(value)))}
            fingerprints[key] = folder["fingerprint"] if Path(value).is_dir() else f"hub:{value}"
    return {"recipe": written, "inputs": fingerprints, "external": node.stage.external(node.recipe)}


def in_order(node: Node) -> Iterator[Node]:
    """The recipes of the graph, each once, inputs first."""
    seen: list[Node] = []

    def visit(each: Node) -> None:
        for value in each.inputs.values():
            if isinstance(value, Node):
                visit(value)
        if all(each is not other for other in seen):
            seen.append(each)

    visit(node)
    return iter(seen)


# ---- the state on disk


def state_of(node: Node) -> tuple[State, list[str]]:
    """The state of a node's folder, and for a changed one the differences.

    Raises:
        HfkitError: if the folder holds something that hfkit did not make, or is damaged.
    """
    folder = node.output_dir
    finished = manifest.read_json(folder)
    started = manifest.read_json(folder, manifest.STARTED)
    made = finished or started
    if made is None:
        if folder.is_file() or (folder.is_dir() and any(path.suffix != manifest.PARTIAL for path in folder.iterdir())):
            raise HfkitError(f"{folder}: holds files that hfkit did not make; choose another output_dir=...")
        return "absent", []
    if made["stage"] != node.recipe.stage:
        raise HfkitError(
            f"{folder}: belongs to {made['name']} (stage {made['stage']}), not to {node.source.path}; "
            f"choose another output_dir=..."
        )
    differences = _differences(made["made_from"], node.made_from)
    for key, entry in made.get("inputs", {}).items():
        now = manifest.read_json(Path(entry["place"]))
        if not differences and now is not None and entry["digest"] not in (None, now["digest"]):
            differences.append(f"{key}: the content of {entry['place']} has changed")
    if differences and not finished and not made.get("committed") and not any(folder.glob("checkpoint-*")):
        return "absent", []  # stopped before there was anything to lose
    if differences:
        return "changed", differences
    if finished:
        manifest.check_whole(folder, finished)
        return "finished", []
    return "unfinished", []


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`train.max_steps: 600 -> 700` for each value that differs."""
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


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def what_runs(node: Node, rebuild: bool = False, fresh: bool = False, force: bool = False) -> dict[str, State]:
    """The folders that must be made, in order, each with its state now.

    Args:
        rebuild: make old results anew. What is `finished` or `changed` here is to be set aside.
        fresh: begin unfinished runs anew. They count as `changed`.
        force: go on from the checkpoints of unfinished runs that have changed. They count as `forced`.

    Raises:
        HfkitError: if finished or unfinished work would be overwritten.
    """
    wanted: dict[str, State] = {}
    problems: list[str] = []

    def visit(each: Node, is_target: bool) -> None:
        needed = [value for value in each.inputs.values() if isinstance(value, Node)]
        is_finished = manifest.read_json(each.output_dir) is not None
        try:
            state, differences = state_of(each)
        except HfkitError as error:
            if not rebuild or not is_finished:
                problems.extend(error.problems)
            state, differences = "changed", []
        may_change = rebuild
        if state in ("unfinished", "changed") and not is_finished and (fresh or force):
            may_change = True
            state = "changed" if fresh else "forced" if state == "changed" else state
        if state == "finished" and not (rebuild and is_target):
            # An input that is gone is not needed; one that has changed matters.
            needed = [value for value in needed if value.output_dir.exists() and state_of(value)[0] == "changed"]
        elif state != "changed" or may_change:
            wanted[str(each.output_dir)] = state
        before = len(problems)
        for value in needed:
            visit(value, False)
        if differences and not may_change and len(problems) == before:  # else they follow from what was told already
            problems.append(_refusal(each, differences, is_target, is_finished))

    visit(node, True)
    if problems:
        raise HfkitError(*dict.fromkeys(problems))
    folders = [str(each.output_dir) for each in in_order(node)]
    return {folder: wanted[folder] for folder in folders if folder in wanted}


def _refusal(node: Node, differences: list[str], is_target: bool, is_finished: bool) -> str:
    folder = node.output_dir
    ways = []
    if is_target:
        ways.append("output_dir=...  to make the new result elsewhere")
    elif is_finished:
        ways.append(f"<key>={folder}  where it is an input, to use it as it is")
    if is_finished:
        ways.append(f"--rebuild  to set {folder} aside as {folder}.old1 and make it anew")
    else:
        ways.append("--force  to go on from its checkpoints all the same")
        ways.append(f"--fresh  to set {folder} aside as {folder}.old1 and begin anew")
    return "\n".join(
        [
            f"{folder}: was made from a different recipe than {node.source.path} is now:",
            *(f"    {line}" for line in differences),
            "  Nothing was changed. The ways on:",
            *(f"    {way}" for way in ways),
        ]
    )
