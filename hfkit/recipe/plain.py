"""Objects of libraries as the values of a recipe."""

import dataclasses
import enum
import os
from collections.abc import Mapping
from typing import Any

from hfkit.artifacts.manifest import Json

OWN = ("output_dir", "runtime_config")  # of sections: what hfkit sets, or what is not of the recipe


def plain(value: object) -> Any:
    """Return a value as YAML would have it: of an object of a library what differs from its defaults."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(_changed(value))
    if hasattr(value, "to_diff_dict"):
        changes = value.to_diff_dict()
        names = ("model_type", "transformers_version", "architectures", "quant_method")
        return plain({name: item for name, item in changes.items() if name not in names})
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _changed(value: Any) -> Json:
    """Return the arguments of a dataclass that are not its defaults, which may be made in `__post_init__`."""
    fields = [field for field in dataclasses.fields(value) if field.init]
    needed = {field.name: getattr(value, field.name) for field in fields if _is_needed(field)}
    default = type(value)(**needed)
    changed = {field.name: getattr(value, field.name) for field in fields if field.name not in OWN}
    return {name: field for name, field in changed.items() if field != getattr(default, name)}


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
