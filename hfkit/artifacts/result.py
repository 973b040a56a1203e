"""A finished folder, as Python code holds it."""

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished folder.

    Attributes:
        folder: where it lies; it is an input of other calls, of recipes, and of `from_pretrained`.
        metrics: its numbers, as `metrics.json` has them.
    """

    folder: Path
    metrics: dict[str, Any] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, folder: Path) -> "Result":
        return cls(folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8")))

    def __fspath__(self) -> str:
        return str(self.folder)
