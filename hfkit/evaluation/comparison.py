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
    """The models measured one after the other on the same rows of this machine.

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
    for name, place in models.items():
        say(f"  measuring {name}")
        measured[name] = measure(scoring, rows, place, prompts)
    outcomes = [each.outcome for each in measured.values()]
    statistics = statistics_of(scoring, rows, outcomes)
    comparable = same_tokens(outcomes)
    found = []
    for index, (name, each) in enumerate(measured.items()):
        scores = scores_of(statistics[index], statistics[0] if index else None)
        if not comparable:
            scores = {key: value for key, value in scores.items() if not key.startswith("perplexity_") or key in KEPT}
        row = {"name": name, "place": models[name], **scores, **each.costs}
        row["training_seconds"] = training_seconds(models[name])
        found.append({**row, "samples": [list(pair) for pair in each.samples]})
    quality = next(name for name in qualities() if name in found[0])
    return {
        "quality": quality,
        "undominated": [row["name"] for row in found if not any(dominates(other, row, quality) for other in found)],
        "rows": len(rows),
        "models": found,
        "signatures": [each.signature for each in statistics[0].values()],
        "seconds": time.perf_counter() - start,
        "model_seconds": sum(each.seconds for each in measured.values()),
    }


def dominates(other: Metrics, row: Metrics, quality: str) -> bool:
    """Whether another model is at least as good in quality, size and speed, and better in one."""
    sign = -1 if is_lower_better(quality) else 1
    theirs, own = (
        (sign * each[quality], -(each["size_bytes"] or 0), each["tokens_per_second"]) for each in (other, row)
    )
    return is_better(theirs, own)


def is_better(theirs: tuple[float, ...], own: tuple[float, ...]) -> bool:
    """Whether all of theirs are at least as high, and one is higher."""
    return theirs != own and all(other >= each for other, each in zip(theirs, own, strict=True))


def training_seconds(place: str) -> float | None:
    """The time that making a model took, that of the models it was made from included; None where it is not known."""
    seen: dict[Path, float] = {}

    def visit(folder: Path) -> None:
        made = manifest.read_json(folder)
        if made is not None and folder not in seen:
            seen[folder] = made["seconds"]
            for key, entry in made["inputs"].items():
                if key in MODEL_INPUTS:
                    visit(Path(entry["place"]))

    visit(Path(place))
    return sum(seen.values()) if seen else None


def beside_base(found: Json, limits: dict[str, str]) -> Metrics:
    """Of a comparison the numbers of the last, as `base_*` those of the first, and as `accept` the limits on them."""
    of_others = ("name", "place", "samples", "training_seconds")
    rows = found["models"][0], found["models"][-1]
    base, result = ({key: value for key, value in row.items() if key not in of_others} for row in rows)
    of_base = {f"base_{key}": value for key, value in base.items()}
    return {**result, **of_base, "accept": judged(limits, result, base)}
