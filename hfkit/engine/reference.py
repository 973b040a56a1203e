"""The reference of every recipe key as a page, from the JSON schemas."""

import json
from pathlib import Path

from hfkit.artifacts.manifest import Json
from hfkit.engine import graph
from hfkit.reports.markdown import cell

TITLE = """# Every key of every recipe

Made by `hfkit schema --reference docs/recipes.md` from the schemas that editors use. A key without a default must be
given. What a key takes from a library is documented there; its names and defaults are those of the library.
"""
ORDER = ("prepare", "tokenizer", "pretrain", "finetune", "distill", "prune", "quantize", "evaluate", "compare")


def page(schemas: Path) -> str:
    """Return the page of all stages, in the order in which they are usually run.

    Args:
        schemas: folder with `<stage>.json`.
    """
    names = sorted(graph.stage_names(), key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return "\n".join([TITLE, *(_stage(name, schemas / f"{name}.json") for name in names)])


def _stage(name: str, path: Path) -> str:
    schema = json.loads(path.read_text(encoding="utf-8"))
    required = set(schema.get("required", []))
    properties = {key: value for key, value in schema["properties"].items() if key != "stage"}
    parts = [f"## `stage: {name}`\n", f"{_line(schema['description'])}\n", _keys(properties, required)]
    for title, inner in schema.get("$defs", {}).items():
        if "properties" in inner:
            parts += [f"\n### {title}\n", f"{_line(inner.get('description', ''))}\n"]
            parts.append(_keys(inner["properties"], set(inner.get("required", []))))
    return "\n".join(parts) + "\n"


def _keys(properties: Json, required: set[str]) -> str:
    rows = [
        [f"`{key}`", cell(_kind(value)), _default(key, value, required), cell(_line(value.get("description", "")))]
        for key, value in properties.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [["key", "value", "default", ""], ["---"] * 4, *rows])


def _kind(value: Json) -> str:
    """Return what a value must be, in words."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(option) for option in value["anyOf"] if option.get("type") != "null"))
    if "$ref" in value:
        return value["$ref"].rpartition("/")[2]
    if "enum" in value:
        return ", ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if value.get("type") == "array":
        return f"list of {_kind(value.get('items', {})) or 'anything'}"
    if value.get("type") == "object":
        return "mapping"
    bounds = [
        f"{sign} {value[name]:g}"
        for name, sign in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"),
                           ("exclusiveMaximum", "below"))
        if name in value
    ]  # fmt: skip
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    return " ".join([words.get(value.get("type", ""), ""), ", ".join(bounds)]).strip()


def _default(key: str, value: Json, required: set[str]) -> str:
    if key in required or "default" not in value:
        return ""
    default = value["default"]
    return "" if default is None else f"`{json.dumps(default)}`"


def _line(text: str) -> str:
    return " ".join(text.split())
