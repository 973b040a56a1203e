"""Models side by side: what each is worth, with intervals and differences from the first, and what it costs."""

import time
from pathlib import Path

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json, Metrics
from hfkit.data.corpus import Row
from hfkit.evaluation.measuring import measure
from hfkit.evaluation.outcomes import same_tokens, statistics_of
from hfkit.evaluation.settings import Scoring
from hfkit.metrics.catalogue import is_lower_better, qualities
from hfkit.metrics.scoring import scores as scores_of
from hfkit.recipe.limits import judged
from hfkit.runtime.distributed import say

KEPT = ("perplexity_low", "perplexity_high")  # of what is taken per token, where models have other tokens
MODEL_INPUTS = ("model", "teacher", "student")


def compared(scoring: Scoring, rows: list[Row], models: dict[str, str], prompts: list[str] | None = None) -> Metrics:
    """Measure the models one after the other on the same rows of this machine.

    Args:
        models: the place of each by its name; the first is what the others are compared with.
        prompts: see `measure`.

    Returns:
        `models`: of each a row with `name`, `place`, its scores (see `scoring.scores`), `limits.COSTS`,
        `training_seconds` and `samples`; `quality`: the score that stands for it; `undominated`: the names of those
        that no other is at least as good as in quality, size and speed, and better in one; `seconds` and
        `model_seconds`: of the whole, and of that what the models themselves took.
    """
    start = time.perf_counter()
    measured = {}
    for name, path in models.items():
        say(f"  measuring {name}")
        measured[name] = measure(scoring, rows, path, prompts)
    outcomes = [measurement.outcome for measurement in measured.values()]
    statistics = statistics_of(scoring, rows, outcomes)
    comparable = same_tokens(outcomes)
    entries = []
    for index, (name, measurement) in enumerate(measured.items()):
        scores = scores_of(statistics[index], statistics[0] if index else None)
        if not comparable:
            scores = {key: value for key, value in scores.items() if not key.startswith("perplexity_") or key in KEPT}
        row = {"name": name, "place": models[name], **scores, **measurement.costs}
        row["training_seconds"] = training_seconds(models[name])
        entries.append({**row, "samples": [list(pair) for pair in measurement.samples]})
    quality = next(name for name in qualities() if name in entries[0])
    return {
        "quality": quality,
        "undominated": [
            row["name"] for row in entries if not any(dominates(other, row, quality) for other in entries)
        ],
        "rows": len(rows),
        "models": entries,
        "signatures": [statistic.signature for statistic in statistics[0].values()],
        "seconds": time.perf_counter() - start,
        "model_seconds": sum(measurement.seconds for measurement in measured.values()),
    }


def dominates(other: Metrics, row: Metrics, quality: str) -> bool:
    """Return whether another model is at least as good in quality, size and speed, and better in one."""
    sign = -1 if is_lower_better(quality) else 1
    theirs, own = (
        (sign * entry[quality], -(entry["size_bytes"] or 0), entry["tokens_per_second"]) for entry in (other, row)
    )
    return is_better(theirs, own)


def is_better(theirs: tuple[float, ...], own: tuple[float, ...]) -> bool:
    """Return whether all of theirs are at least as high, and one is higher."""
    return theirs != own and all(other >= value for other, value in zip(theirs, own, strict=True))


def training_seconds(path: str) -> float | None:
    """Return the time that making a model took, that of the models it was made from included; None where it is not
    known."""
    seconds_of: dict[Path, float] = {}

    def visit(folder: Path) -> None:
        record = manifest.read_json(folder)
        if record is not None and folder not in seconds_of:
            seconds_of[folder] = record["seconds"]
            for key, entry in record["inputs"].items():
                if key in MODEL_INPUTS:
                    visit(Path(entry["place"]))

    visit(Path(path))
    return sum(seconds_of.values()) if seconds_of else None


def beside_base(comparison: Json, limits: dict[str, str]) -> Metrics:
    """Return the numbers of the last model of a comparison, as `base_*` those of the first, and as `accept` the limits
    on them."""
    of_others = ("name", "place", "samples", "training_seconds")
    rows = comparison["models"][0], comparison["models"][-1]
    base, result = ({key: value for key, value in row.items() if key not in of_others} for row in rows)
    of_base = {f"base_{key}": value for key, value in base.items()}
    return {**result, **of_base, "accept": judged(limits, result, base)}
