"""What a card says to the Hub: its metadata, in huggingface_hub's own classes."""

from pathlib import Path
from typing import Any, NamedTuple

from hfkit.artifacts.kinds import KINDS
from hfkit.artifacts.lineage import pushed_to
from hfkit.artifacts.manifest import Json, Manifest, Metrics, is_adapter, read_json
from hfkit.data.tasks import task_in
from hfkit.metrics.catalogue import on_hub

RELATIONS = {"quantize": "quantized", "finetune": "finetune", "prune": "finetune"}  # to `base_model`
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


class Score(NamedTuple):
    """A score on test data with its 95 % interval, where that is known."""

    name: str
    value: float
    low: float | None
    high: float | None


def scores_of(metrics: Metrics, prefix: str = "") -> list[Score]:
    """Return the scores in a `metrics.json`: of the result itself, or with `teacher_`, `base_` and so on of
    another."""
    named = ((name, f"{prefix}{name}") for name in on_hub())
    return [
        Score(name, metrics[key], metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))
        for name, key in named
        if isinstance(metrics.get(key), int | float)
    ]


def hub_id(entry: Json) -> str | None:
    """Return the id on the Hub of an input in a manifest: that it was named by, or that it was pushed to; else
    None."""
    if entry["stage"] is None and not Path(entry["place"]).exists():
        return entry["place"]
    pushed = pushed_to(entry)
    return pushed["repo"] if pushed else None


def metadata(folder: Path, content: Manifest) -> str:
    """Return the YAML at the head of a card, without its fences."""
    if KINDS[content["makes"]].repository == "dataset":
        return _of_data(content)
    from huggingface_hub import ModelCardData

    tags = ["hfkit", content["stage"]]
    if content["makes"] != "model":
        return ModelCardData(library_name=KINDS[content["makes"]].library, tags=tags).to_yaml()
    config = read_json(folder, "config.json") or {}
    kind = "text-classification" if task_in(content["recipe"]).has_classes else "text-generation"
    base = next((content["inputs"][key] for key in ("model", "student") if key in content["inputs"]), None)
    base_id = hub_id(base) if base else None
    data = content["inputs"].get("data")
    data_id = hub_id(data) if data else None
    relation = "adapter" if is_adapter(folder) else RELATIONS.get(content["stage"])
    related: dict[str, Any] = {"base_model_relation": relation} if base_id and relation else {}
    return ModelCardData(
        library_name="peft" if is_adapter(folder) else "transformers",
        pipeline_tag=None if config.get("is_encoder_decoder") else kind,
        base_model=base_id,
        datasets=[data_id] if data_id else None,
        tags=tags,
        model_name=content["name"],
        eval_results=_index(content, kind) or None,
        **related,
    ).to_yaml()


def _index(content: Manifest, task: str) -> list[Any]:
    from huggingface_hub import EvalResult

    entry = content["inputs"].get("data")
    if entry is None:
        return []
    split = content["recipe"].get("split", "test")
    return [
        EvalResult(
            task_type=task,
            dataset_type=hub_id(entry) or Path(entry["place"]).name,
            dataset_name=Path(entry["place"]).name,
            dataset_split=split,
            metric_type=on_hub()[score.name],
            metric_name=score.name,
            metric_value=score.value,
            metric_args=None if score.low is None else {"confidence": 0.95, "low": score.low, "high": score.high},
        )
        for score in scores_of(content["metrics"])
    ]


def _of_data(content: Manifest) -> str:
    from huggingface_hub import DatasetCardData

    rows = content["metrics"]["rows"]
    files = [{"split": split, "path": f"{split}.parquet"} for split in content["metrics"]["splits"]]
    return DatasetCardData(
        size_categories=next((name for limit, name in SIZES if rows < limit), "n>1M"),
        task_categories=["text-classification" if _has_labels(content) else "text-generation"],
        pretty_name=content["name"],
        configs=[{"config_name": "default", "data_files": files}],
        tags=["hfkit"],
    ).to_yaml()


def _has_labels(content: Manifest) -> bool:
    return bool({"label", "labels"} & {*content["recipe"]["columns"].values()})
