"""What `hfkit plan` says of every recipe beside what running it takes: seconds, and the peak of the memory.

    python benchmarks/plan.py            # writes benchmarks/results/plan.json; half an hour on two cores
    python benchmarks/plan.py data       # measures these again, and keeps the others of the file

Each recipe is planned when those that it needs are done, as a user would, and then run by `accelerate launch`, in an
empty folder and with an empty cache of compiled code. Options behind `--` go to every recipe that has a training, for
a short run: `python benchmarks/plan.py -- train.max_steps=20`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from hfkit.engine import graph, plans
from hfkit.runtime import resources

ROOT = Path(__file__).parent.parent
SECONDS, MEMORY = 0.30, 0.15  # how far a plan may be off


def recipes(folder: Path) -> list[Path]:
    """All of a folder's, each after those that it needs."""
    found: list[Path] = []
    for path in sorted(folder.glob("*.yaml")):
        found += [each.source.path for each in graph.in_order(graph.resolve(path)) if each.source.path not in found]
    return found


def run(command: list[str], folder: Path, cache: Path) -> float:
    """Seconds of the command."""
    begun = time.time()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 3):  # 3: it misses what it accepts, but is made
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.time() - begun


def row(path: Path, folder: Path, options: list[str]) -> dict[str, Any]:
    """One recipe, planned and run."""
    told = yaml.safe_load((folder / path).read_text(encoding="utf-8"))
    given = options if "train" in told else []
    plan_seconds = run(["hfkit", "plan", str(path), *given], folder, folder / "compiled")
    node = graph.resolve(path, given)
    planned = plans.kept(node) or {}
    whole = run(["accelerate", "launch", str(path), *given], folder, folder / "compiled")
    made = json.loads((folder / node.output_dir / "hfkit.json").read_text(encoding="utf-8"))
    used = made.get("usage", {})
    actual = {"seconds": made["seconds"], **{key: used[key] for key in used if key != "hardware"}}
    ratios = {key: round(planned[key] / actual[key], 3) for key in ("seconds", "peak_memory_bytes") if actual.get(key)}
    return {
        "planned": planned,
        "actual": actual,
        "planned_over_actual": ratios,
        "plan_seconds": round(plan_seconds, 1),
        "command_seconds": round(whole, 1),
    }


def main() -> None:
    names, options = sys.argv[1:], list[str]()
    if "--" in names:
        names, options = names[: names.index("--")], names[names.index("--") + 1 :]
    results = ROOT / "benchmarks" / "results" / "plan.json"
    rows: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))["recipes"] if names else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipes").symlink_to(ROOT / "recipes")
        os.chdir(folder)
        for path in recipes(Path("recipes")):
            if names and path.stem not in names:
                continue
            rows[path.stem] = row(path, folder, options)
            ratios = rows[path.stem]["planned_over_actual"]
            print(f"{path.stem:<14} " + ", ".join(f"{key} {value:.2f}x" for key, value in ratios.items()), flush=True)
    limits = {"seconds": SECONDS, "peak_memory_bytes": MEMORY}
    off = {
        key: sorted(
            (name for name, each in rows.items() if abs(each["planned_over_actual"].get(key, 1) - 1) > limit),
        )
        for key, limit in limits.items()
    }
    result = {
        "recipes": rows,
        "limits": limits,
        "outside": off,
        "options": options,
        "hardware": resources.hardware(),
    }
    if not options:
        results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(off, indent=2))


if __name__ == "__main__":
    main()
