"""A recipe file as written: its values, and where each of them stands.

Reads YAML 1.2's core schema, closed where YAML surprises: `1e-3` is a number, `no` and `on` are strings, a key stands
once, and there are no tags, anchors or aliases.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hfkit.errors import HfkitError, did_you_mean
from hfkit.privacy import secrets

Key = tuple[str | int, ...]

_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


@dataclasses.dataclass
class Source:
    """A recipe as written. `problems` are those of the YAML itself, found on the way."""

    path: Path
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[Key, str] = dataclasses.field(default_factory=dict)  # key -> "x.yaml:12" or "command line"
    problems: list[str] = dataclasses.field(default_factory=list)

    def problem(self, key: Key, message: str) -> str:
        """Return `recipes/x.yaml:12: train.max_steps: MESSAGE`, with the line of the nearest key that was written."""
        near = key
        while near and near not in self.origins:
            near = near[:-1]
        origin = self.origins.get(near, str(self.path))
        name = ".".join(map(str, key))
        if origin == "command line":
            name += f"={self.get(key)}"
        return f"{origin}: {name}: {message}" if name else f"{origin}: {message}"

    def get(self, key: Key) -> Any:
        """Return the value at a key; None where there is none."""
        value: Any = self.values
        for part in key:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def existing(self, key: Key) -> Key:
        """Return the longest beginning of a key that was written."""
        value: Any = self.values
        for depth, part in enumerate(key):
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return key[:depth]
        return key


def read(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Read the recipe at `path`, then set the `key.sub=value` overrides in it.

    Raises:
        HfkitError: if the file cannot be read, is not YAML, or is not a mapping with a `stage`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.yaml")])
        raise HfkitError(f"{path}: there is no such recipe; {near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HfkitError(f"{path}: cannot be read: {error}") from None
    source = Source(path)
    _refuse_secrets(path, text, overrides)
    node = _compose(text, str(path))
    if not isinstance(node, yaml.MappingNode):
        raise HfkitError(f"{path}: not a recipe: a recipe is a mapping with a `stage:` key, such as `stage: pretrain`")
    source.values = _construct(node, (), source, str(path))
    for override in overrides:
        _override(source, override)
    if not isinstance(source.values.get("stage"), str):
        problem = f"{path}: not a recipe: it has no `stage:` key, such as `stage: pretrain`"
        raise HfkitError(*source.problems, problem)
    return source


def _refuse_secrets(path: Path, text: str, overrides: Sequence[str]) -> None:
    """Refuse secrets before anything of a recipe is shown or kept: what it says lands in manifests, cards and
    messages."""
    lines = [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]
    lines += [("command line", override) for override in overrides]
    problems = [
        f"{where}: holds a token or password; delete it: tokens come from the environment or `hf auth login`"
        for where, line in lines
        if secrets.holds_secret(line)
    ]
    if problems:
        raise HfkitError(*problems)


def _compose(text: str, origin: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)  # the base loader gives every scalar as its text
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}:{mark.line + 1}" if mark and origin != "command line" else origin
        raise HfkitError(f"{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise HfkitError(f"{origin}: not valid YAML: {error}") from None


def _construct(node: yaml.Node, key: Key, source: Source, origin: str) -> Any:
    """Return the value of a YAML node, with the line of everything in it noted in `source`."""
    file = origin.split(":")[0]
    where = origin if file == "command line" else f"{file}:{node.start_mark.line + 1}"
    source.origins.setdefault(key, where)
    if node.tag not in _PLAIN_TAGS:
        problem = f"tag {node.tag}: a recipe holds plain values only; delete the tag"
        source.problems.append(source.problem(key, problem))
        return None
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*key, index), source, where) for index, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else str(name_node.value)
        line = where if file == "command line" else f"{file}:{name_node.start_mark.line + 1}"
        if name in values:
            first = source.origins[(*key, name)]
            dotted = ".".join(map(str, (*key, name)))
            source.problems.append(f"{line}: {dotted}: stands twice, first at {first}; delete one of the two")
            continue
        source.origins[(*key, name)] = line
        values[name] = _construct(value_node, (*key, name), source, where)
    return values


def _scalar(text: str) -> Any:
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _override_value(text: str, key: Key, source: Source) -> Any:
    """Return the value behind `key=` on the command line: YAML, or where it is none the text itself.

    `{question}` is a template, though YAML takes it for a mapping from `question` to nothing.
    """
    if not text:
        return None
    try:
        node = _compose(text, "command line")
    except HfkitError:
        return text
    value = _construct(node, key, source, "command line") if node is not None else None
    return text if isinstance(value, dict) and not any(value.values()) and value and text.startswith("{") else value


def _override(source: Source, override: str) -> None:
    """Set one `key.sub=value` of the command line."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise HfkitError(f"command line: {override}: not an override; write key=value, such as train.max_steps=100")
    key: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    parent: Any = source.values
    for depth, part in enumerate(key[:-1]):
        if isinstance(parent, dict) and parent.get(part) is None:
            parent[part] = {}
        parent = source.get(key[: depth + 1])
        if not isinstance(parent, dict | list):
            within = ".".join(map(str, key[: depth + 1]))
            raise HfkitError(f"command line: {override}: {within} is {parent!r}, which has no keys of its own")
    for old in [old for old in source.origins if old[: len(key)] == key]:
        del source.origins[old]
    value = _override_value(text, key, source)
    source.origins[key] = "command line"
    try:
        parent[key[-1]] = value
    except (IndexError, TypeError):
        raise HfkitError(f"command line: {override}: there is no item {key[-1]} to set") from None
