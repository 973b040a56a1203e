"""The `README.md` of a folder: what it is, how to use it, how good it is, what of, how, and where its limits are."""

import json
from pathlib import Path
from typing import Any

import yaml

from hfkit.artifacts import lineage
from hfkit.artifacts.kinds import KINDS
from hfkit.artifacts.manifest import Json, Manifest, Metrics, is_adapter, read_json, write_file
from hfkit.data.tasks import task_in
from hfkit.reports.markdown import cell, fenced, number, table
from hfkit.reports.metadata import Score, metadata, scores_of
from hfkit.reports.snippets import snippet

OTHERS = {  # the models that a result stands beside, by the beginning of their names in its metrics
    "base_": "the model before",
    "unrecovered_": "pruned, not recovered",
    "teacher_": "its teacher",
    "alone_": "the same without a teacher",
    "validation_": "on validation",
}


def write_card(folder: Path, content: Manifest) -> None:
    """Write the card of a folder from what its manifest will say (`runner._content`, seconds and metrics)."""
    write_file(folder / "README.md", text(folder, content, content["folder"]))


def text(folder: Path, content: Manifest, repo: str) -> str:
    """Return the card.

    Args:
        repo: what the folder is called in it: its path, or its id on the Hub.
    """
    recovered = " and then trained to recover" if content["recipe"].get("recover") else ""
    adapter = ": an adapter, to be used with its base model" if is_adapter(folder) else ""
    sections = [
        f"---\n{metadata(folder, content)}\n---",
        f"# {repo.rpartition('/')[2]}",
        content.get("summary", f"A {content['makes']}, made by hfkit.").format(adapter=adapter, recovered=recovered),
        fenced(snippet(folder, content, repo), "python"),
        *_results(folder, content),
        *_data(content),
        "## Making\n\n" + _making(content),
        fenced(_recipe(content), "yaml"),
        "## Use and limits\n\n" + "\n".join(f"- {line}" for line in _limits(content)),
        "## Lineage\n\n" + fenced(lineage.tree(repo, content)),
    ]
    return "\n\n".join(sections) + "\n"


# ---- results


def _results(folder: Path, content: Manifest) -> list[str]:
    if content["stage"] == "evaluate":
        return [_evaluation(folder, content)]
    if content["stage"] == "compare":
        return [(folder / "report.md").read_text(encoding="utf-8").partition("\n")[2].strip()]
    if content["makes"] != "model":
        return []
    metrics = content["metrics"]
    own = scores_of(metrics)
    others = {title: scores_of(metrics, prefix) for prefix, title in OTHERS.items()}
    others = {title: scores for title, scores in others.items() if scores}
    rows = []
    for score in own:
        beside = [next((other for other in scores if other.name == score.name), None) for scores in others.values()]
        rows.append([score.name, _shown(score), *(_shown(other) if other else "" for other in beside)])
    about = "On the test split; in brackets 95 % intervals, by resampling its rows."
    if content["stage"] in ("pretrain", "distill"):
        about += " These are rows of tokens: from one document to the next the scores vary more."
    sections = ["## Results", about, table(["", "this model", *others], rows)]
    if metrics.get("xz_bits_per_byte"):
        sections.append(f"`xz -9e` needs {metrics['xz_bits_per_byte']:.3f} bits per byte for the same text.")
    if (folder / "loss.png").exists():
        sections.append("![Loss over the steps](loss.png)")
    return sections


def _shown(score: Score) -> str:
    interval = "" if score.low is None or score.high is None else f" ({number(score.low)} to {number(score.high)})"
    return f"{number(score.value)}{interval}"


def _evaluation(folder: Path, content: Manifest) -> str:
    from hfkit.reports import evaluation

    path = folder / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return evaluation.card(content, [json.loads(line) for line in lines])


# ---- data


def _data(content: Manifest) -> list[str]:
    """Return the rows of the data, and what was left out of them and why; of a model the data that it learned from."""
    metrics, about = content["metrics"], ""
    if content["makes"] != "data set":
        path = content["inputs"].get("data", {}).get("place")
        metrics = (path and (read_json(Path(path)) or {}).get("metrics")) or {}
        about = f"`{path}`: "
    if "splits" not in metrics:
        return []
    dropped = ", ".join(f"{count:,} {cell(reason)}" for reason, count in metrics["dropped"].items()) or "nothing"
    rows = [[name, *(number(split[key]) for key in ("rows", "bytes"))] for name, split in metrics["splits"].items()]
    summary = f"{about}{metrics['rows']:,} rows kept; left out: {dropped}."
    return [f"## Data\n\n{summary}\n\n{table(['split', 'rows', 'bytes'], rows)}"]


# ---- making


def _making(content: Manifest) -> str:
    metrics, usage, planned = content["metrics"], content.get("usage") or {}, content.get("planned") or {}
    rows = [["time, s", number(content["seconds"]), _planned(planned, "seconds")]]
    for key, label, unit in (
        ("peak_memory_bytes", "peak memory, MB", 1e6),
        ("energy_kwh", "energy, kWh", 1.0),
        ("co2_kg", "CO2, kg", 1.0),
    ):
        if usage.get(key) is not None:
            rows.append([label, number(usage[key] / unit), _planned(planned, key, unit)])
    has_plan = any(row[2] for row in rows)
    rows = rows if has_plan else [row[:2] for row in rows]
    parts = [
        f"With hfkit's stage `{content['stage']}`{_on(usage)}.",
        table(["", "actual", "planned"][: 2 + has_plan], rows),
    ]
    numbers = (
        "parameters",
        "steps",
        "rows_a_step",
        "tokens_per_second",
        "precision",
        "optimizer",
        "seed",
        "size_bytes",
    )
    facts = [[name, _cell(metrics[name])] for name in numbers if metrics.get(name) is not None]
    scalars = {key for key, value in metrics.items() if isinstance(value, int | float | str)} - {*numbers}
    facts += [[key, _cell(metrics[key])] for key in metrics if key in scalars and _is_fact(key, metrics)]
    return "\n\n".join([*parts, *([table(["", ""], facts)] if facts else [])])


def _recipe(content: Manifest) -> str:
    """Return what differs from the defaults, and the inputs where they lie."""
    inputs: dict[str, Any] = {}
    for key, entry in content["inputs"].items():
        name, _, index = key.partition(".")
        if index:
            inputs.setdefault(name, []).append(entry["place"])
        else:
            inputs[name] = entry["place"]
    rest = dict(content["made_from"]["recipe"])
    return yaml.safe_dump({"stage": rest.pop("stage"), **inputs, **rest}, sort_keys=False, allow_unicode=True).strip()


def _is_fact(key: str, metrics: Metrics) -> bool:
    """Return whether a metric is not in the table of results already."""
    bare = key
    for prefix in OTHERS:
        bare = bare.removeprefix(prefix)
    bare = bare.removesuffix("_low").removesuffix("_high")
    return bare not in {score.name for score in scores_of(metrics)} and key != "xz_bits_per_byte"


def _planned(planned: Json, key: str, unit: float = 1.0) -> str:
    return "" if planned.get(key) is None else number(planned[key] / unit)


def _on(usage: Json) -> str:
    hardware = usage.get("hardware")
    if not hardware:
        return ""
    words = [f"{hardware['processor']} with {hardware['cores']} cores"]
    if hardware.get("memory_bytes"):
        words.append(f"{hardware['memory_bytes'] / 2**30:.0f} GiB of memory")
    return f", on {', '.join(cell(word) for word in [*words, *hardware.get('gpus', [])])}"


def _cell(value: float | str) -> str:
    return cell(value) if isinstance(value, str) else str(value) if isinstance(value, bool) else number(value)


# ---- limits


def _limits(content: Manifest) -> list[str]:
    metrics, recipe = content["metrics"], content["recipe"]
    if limits := KINDS[content["makes"]].limits:
        return list(limits)
    lines = [
        "It only knows its training data and can state falsehoods confidently. Test it on your own text before use."
    ]
    if task_in(recipe).has_classes:
        lines = ["It chooses one of its classes for any text, also one that belongs to none of them."]
        if "exact_match" in metrics:  # of lists of classes
            lines = ["It names the classes whose probability reaches a threshold of `config.json`, if any does."]
    if recipe.get("sequence_length"):
        lines.append(f"It was trained on at most {recipe['sequence_length']:,} tokens at once.")
    if content["stage"] == "prune" and metrics.get("zeros"):
        lines.append(
            f"{metrics['zeros']:.1%} of its matrices' weights are 0: it is sparse, of the same size and speed."
        )
    if content["stage"] == "quantize":
        lines.append(
            "Smaller is not always faster: `tokens_per_second` beside `base_tokens_per_second` says what it is here."
        )
    if any(score.low is None for score in scores_of(metrics)):
        lines.append("Scores without an interval come from one number; do not read much into small differences.")
    return lines
