"""Which recipes must run first: the graph that the recipes are, read and checked."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hfkit import stages
from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json
from hfkit.data.guess import guess, is_data_file
from hfkit.data.tasks import TASKS
from hfkit.errors import HfkitError, did_you_mean
from hfkit.recipe import yaml_source
from hfkit.recipe.fields import Input, ResolvedInput, ResolvedInputs, StageRecipe, marked
from hfkit.recipe.validation import parse, section_problems
from hfkit.runtime.distributed import say

_HUB_ID = re.compile(r"(?!runs/)[\w.-]+(/[\w.-]+)?")
_PATH = re.compile(r"[./~]|.*\.(jsonl?|csv|tsv|parquet|txt|md|py|gz|zst|zip|ya?ml|safetensors|gguf)$")


@dataclasses.dataclass
class Node:
    """One recipe of the graph, checked, with what it needs."""

    source: yaml_source.Source
    stage: ModuleType
    recipe: StageRecipe
    inputs: dict[str, "Node | str"]  # key -> the recipe that makes it, or a folder or Hub id as it was written
    made_from: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output_dir or f"runs/{self.source.path.stem}").expanduser()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()

    def resolved(self) -> ResolvedInputs:
        """Return each input with its place, a folder or an id on the Hub, and the recipe that makes it."""
        return {
            key: ResolvedInput(str(value.output_dir), value.recipe)
            if isinstance(value, Node)
            else ResolvedInput(value)
            for key, value in self.inputs.items()
        }


def stage_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(stages.__path__)]


def load_stage(name: str) -> ModuleType:
    return importlib.import_module(f"hfkit.stages.{name}")


# ---- reading and checking the graph


def resolve(recipe: Path | yaml_source.Source, overrides: Sequence[str] = ()) -> Node:
    """Return the graph that ends in a recipe, with every recipe of it read and checked.

    Args:
        recipe: the path of a file, or a recipe that was read already.

    Raises:
        HfkitError: with every mistake of every recipe.
    """
    problems: list[str] = []
    source = recipe if isinstance(recipe, yaml_source.Source) else None
    node = _resolve(source.path if source else recipe, overrides, {}, [], problems, source)  # type: ignore[arg-type]
    if problems or node is None:
        raise HfkitError(*dict.fromkeys(problems))
    folders: dict[Path, Path] = {}
    for item in in_order(node):
        other = folders.setdefault(item.output_dir.resolve(), item.source.path)
        if other != item.source.path:
            raise HfkitError(f"{item.source.path}: output_dir={item.output_dir}: {other} writes there too; change one")
    return node


def _resolve(
    path: Path,
    overrides: Sequence[str],
    nodes: dict[Path, Node | None],
    above: list[Path],
    problems: list[str],
    root_source: yaml_source.Source | None = None,
) -> Node | None:
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(item.name for item in [*above[above.index(resolved) :], resolved])
        problems.append(f"{path}: circular dependency ({chain}); name a folder instead of one of these recipes")
        return None
    if resolved not in nodes:
        nodes[resolved] = None
        try:
            source = root_source or yaml_source.read(path, overrides)
            name = source.values["stage"]
            if name not in stage_names():
                hint = did_you_mean(name, stage_names())
                raise HfkitError(source.problem(("stage",), f"there is no stage {name!r}, {hint}"))
            stage = load_stage(name)
            before = len(problems)
            inputs = _resolve_inputs(source, stage.Recipe, nodes, [*above, resolved], problems)
            recipe, mistakes = parse(source, stage.Recipe)
            node = Node(source, stage, recipe, inputs) if recipe is not None else None
            has_inputs = len(problems) == before  # otherwise one of them is wrong
            is_made = node is not None and has_inputs and not mistakes and _is_made(node)
            if not is_made:
                mistakes += section_problems(source, stage.Recipe)
            if mistakes:
                raise HfkitError(*dict.fromkeys(mistakes))
            if node is not None and has_inputs:
                nodes[resolved] = node if is_made else _checked(node)
        except HfkitError as error:
            problems.extend(error.problems)
    return nodes[resolved]


def _resolve_inputs(
    source: yaml_source.Source,
    recipe_class: type[StageRecipe],
    nodes: dict[Path, Node | None],
    above: list[Path],
    problems: list[str],
) -> dict[str, Node | str]:
    """Return each input that the recipe names: the recipe behind it where there is one, else the folder or id."""
    inputs: dict[str, Node | str] = {}
    for name, marker in marked(recipe_class, Input).items():
        setting = source.values.get(name)
        # A list of inputs has the keys `models.0`, `models.1` ..., a mapping those of its names.
        several = dict(enumerate(setting)) if isinstance(setting, list) else setting
        named = {f"{name}.{key}": item for key, item in several.items()} if isinstance(several, dict) else {}
        for key, value in (named or {name: setting}).items():
            if isinstance(value, str):
                value = str(Path(value).expanduser()) if value.startswith("~") else value
                if marker.kind == "data set" and is_data_file(value) and manifest.read_json(Path(value)) is None:
                    result: Node | str | None = _implicit(source, key, value, nodes, problems)
                else:
                    result = _resolve_input(source, key, value, marker, nodes, above, problems)
                inputs |= {} if result is None else {key: result}
    return inputs


def _resolve_input(
    source: yaml_source.Source,
    key: str,
    value: str,
    marker: Input,
    nodes: dict[Path, Node | None],
    above: list[Path],
    problems: list[str],
) -> Node | str | None:
    location = tuple(map(_part, key.split(".")))
    if value.endswith((".yaml", ".yml")):
        beside = source.path.parent / value
        path = beside if beside.exists() else Path(value)
        if not path.exists():
            rule = f"there is no such recipe, neither in {source.path.parent} nor here; write it, or name a folder"
            problems.append(source.problem(location, f"{value}: {rule}"))
        node = _resolve(path, (), nodes, above, problems) if path.exists() else None
        if node is None:
            return None
        result: Node | str = node
        kind = node.recipe.MAKES
    else:
        record = manifest.read_json(Path(value))
        result, kind = value, load_stage(record["stage"]).Recipe.MAKES if record else marker.kind
        is_path = _PATH.match(value) or ("/" in value and Path(value).parent.is_dir())
        if not Path(value).exists() and (is_path or not _HUB_ID.fullmatch(value)):
            near = did_you_mean(Path(value).name, [entry.name for entry in Path(value).parent.glob("*")])
            rule = f"there is no such folder, {near}; name a folder, a recipe (x.yaml) or an id on the Hub"
            problems.append(source.problem(location, f"{value}: {rule}"))
    if kind != marker.kind:
        name = key.split(".")[0]
        problems.append(source.problem(location, f"{value}: is a {kind}, but {name} must be a {marker.kind}"))
    return result


def _implicit(
    source: yaml_source.Source, key: str, files: str, nodes: dict[Path, Node | None], problems: list[str]
) -> Node | None:
    """Return the preparation of data files that stand where a data set is asked for, with its defaults.

    What the recipe does not say of their columns is taken from their names, and set in it.
    """
    task = TASKS.get(source.values.get("task", "text"))
    stage = load_stage("prepare")
    try:
        layout = guess(files, task, source.values) if task is not None else None
    except HfkitError as error:
        problems.append(source.problem((key,), str(error)))
        return None
    if task is None or layout is None:  # what is wrong with the task is told elsewhere
        return None
    source.values |= layout.keys
    column = {} if layout.names.get("text", "text") == "text" else {"text": layout.names["text"]}
    kinds = {"text": "text"} if task.is_text else layout.columns
    values = {"stage": "prepare", "sources": [{"files": files, **column}], "columns": kinds}
    name = ".".join([re.sub(r"[^\w.-]+", "-", files).strip("-."), "-".join(kinds)])
    folder = Path("runs", name)
    if (existing := nodes.get(folder)) is not None:
        return existing
    recipe = stage.Recipe.model_validate({**values, "output_dir": str(folder)})
    node = Node(yaml_source.Source(Path(files), values), stage, recipe, {})
    if layout.names:
        say(f"{files}: " + ", ".join(f"{key} is {columns}" for key, columns in layout.names.items()))
    try:
        nodes[folder] = _checked(node)
    except HfkitError as error:
        problems.extend(error.problems)
    return nodes.get(folder)


def _is_made(node: Node) -> bool:
    """Return whether the folder of a node was made from the same, and so checked then: to know that it is up to date,
    no library has to be loaded. What it is made from is noted, unless something is wrong with that, which a check
    tells."""
    if not node.made_from:
        with contextlib.suppress(HfkitError):
            node.made_from = _made_from(node)
    record = manifest.read_json(node.output_dir) or {}
    return bool(node.made_from) and record.get("made_from") == node.made_from


def _checked(node: Node) -> Node:
    """Check the node, and return it with what it is made from."""
    if not _is_made(node):
        _check(node)
        node.made_from = node.made_from or _made_from(node)
    return node


def _check(node: Node) -> None:
    """Check what the stage itself checks: one setting against another, and against what the inputs are known to be."""
    messages = node.stage.check(node.recipe, node.resolved())
    problems = [node.source.problem(tuple(map(_part, key.split("."))), text) for key, text in messages]
    if problems:
        raise HfkitError(*problems)


def _part(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _made_from(node: Node) -> Json:
    """Return what the result depends on: compared with what a folder on disk was made from."""
    inputs = {key.split(".")[0] for key in node.inputs}
    settings = node.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir", "push", *inputs})
    fingerprints = {}
    for key, value in node.inputs.items():
        if isinstance(value, Node):
            fingerprints[key] = value.fingerprint
        else:
            record = manifest.read_json(Path(value)) if Path(value).is_dir() else {}
            folder = record or {"fingerprint": manifest.digest_of(manifest.describe_files(Path(value)))}
            fingerprints[key] = folder["fingerprint"] if Path(value).is_dir() else f"hub:{value}"
    return {"recipe": settings, "inputs": fingerprints, "external": node.recipe.external_inputs()}


def in_order(node: Node) -> Iterator[Node]:
    """Return the recipes of the graph, each once, inputs first."""
    nodes: list[Node] = []

    def visit(current: Node) -> None:
        for value in current.inputs.values():
            if isinstance(value, Node):
                visit(value)
        if all(current is not other for other in nodes):
            nodes.append(current)

    visit(node)
    return iter(nodes)
