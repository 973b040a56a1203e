"""What a plan said of a recipe, kept for its card."""

import contextlib
import json
from pathlib import Path
from typing import Any

from hfkit.artifacts import manifest
from hfkit.artifacts.cache import beside, path_of
from hfkit.artifacts.manifest import Json


def _path(node: Any) -> Path:
    return path_of(beside(Path(node.output_dir)), "plan", node.fingerprint, ".json")


def keep(node: Any, planned: Json) -> None:
    """Keep what a plan for this machine said of a recipe, a `hfkit.engine.graph.Node`, for its card."""
    path = _path(node)
    with contextlib.suppress(OSError):  # a plan changes nothing, and needs no folder that it may write to
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_json(path, {"fingerprint": node.fingerprint, **planned})


def kept(node: Any) -> Json | None:
    """Return what the last `hfkit plan` for this machine said of this very recipe: `seconds`, `peak_memory_bytes`,
    `energy_kwh`, `co2_kg`, `dollars`, `disk_bytes`, `tokens`, `steps`. None where there was none."""
    try:
        planned = json.loads(_path(node).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return planned if planned.pop("fingerprint", None) == node.fingerprint else None
