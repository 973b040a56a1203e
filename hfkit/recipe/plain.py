"""Objects of libraries as the values of a recipe."""

import dataclasses
import enum
import os
from collections.abc import Mapping
from typing import Any

from hfkit.artifacts.manifest import Json

OWN = ("output_dir", "runtime_config")  # of sections: what hfkit sets, or what is not of the recipe


def plain(value: object) -> Any:
    """A value as YAML would have it: of an object of a library what differs from its defaults."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(_changed(value))
    if hasattr(value, "to_diff_dict"):
        told = value.to_diff_dict()
        names = ("model_type", "transformers_version", "architectures", "quant_method")
        return plain({name: each for name, each in told.items() if name not in names})
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _changed(value: Any) -> Json:
    """The arguments of a dataclass that are not its defaults, which may be made in `__post_init__`."""
    fields = [each for each in dataclasses.fields(value) if each.init]
    needed = {each.name: getattr(value, each.name) for each in fields if _is_needed(each)}
    default = type(value)(**needed)
    changed = {each.name: getattr(value, each.name) for each in fields if each.name not in OWN}
    return {name: each for name, each in changed.items() if each != getattr(default, name)}


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
