"""The `README.md` of a folder: what it is, how it was made, how good it is, how to use it."""

import json
from pathlib import Path
from typing import Any

import yaml

from hfkit.hub.markdown import cell, fenced, number, table
from hfkit.manifest import write_file

_GENERATE = """from transformers import pipeline

generate = pipeline("text-generation", "{folder}", trust_remote_code=True)
print(generate("def main():", max_new_tokens=40)[0]["generated_text"])"""
_USE = {
    "tokenizer": """from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
print(tokenizer.tokenize("def main():"))""",
    "pretrain": _GENERATE,
    "finetune": """from hfkit.model.loading import load_model

model = load_model("{folder}", task="{task}")  # the base model, and the adapter if there is one""",
    "distill": """from hfkit.model.loading import load_model

model = load_model("{folder}")  # the student, and its base model if it is an adapter""",
    "quantize": _GENERATE,
    "prune": _GENERATE,
    "compare": """import json

report = json.load(open("{folder}/report.json"))""",
    "evaluate": """import json

scores = json.load(open("{folder}/metrics.json"))""",
    "prepare": """from datasets import load_dataset

data = load_dataset("parquet", data_files={{"train": "{folder}/train.parquet"}})
print(data["train"][0]["text"])""",
}


def write_card(folder: Path, content: dict[str, Any]) -> None:
    """Write the card of a folder from what its manifest will say (`runner._content`, seconds and metrics)."""
    metadata: dict[str, Any] = {"tags": ["hfkit"]}
    is_classifier = content["recipe"].get("task") == "classify"
    kind = {"pipeline_tag": "text-classification" if is_classifier else "text-generation"}
    if content["stage"] in ("pretrain", "quantize", "prune"):
        metadata = {"library_name": "transformers", **kind, **metadata}
    if content["stage"] in ("finetune", "distill"):
        is_adapter = content["recipe"]["lora"] is not None
        base = content["inputs"].get("model") or content["inputs"].get("student")
        metadata = {
            "library_name": "peft" if is_adapter else "transformers",
            **kind,
            **({"base_model": base["place"]} if base else {}),
            **metadata,
        }
    inputs = "\n".join(
        f"- {key}: `{entry['place']}`" + (f", sha256 `{entry['digest'][:16]}`" if entry["digest"] else "")
        for key, entry in content["inputs"].items()
    )
    recipe = yaml.safe_dump(content["made_from"]["recipe"], sort_keys=False, allow_unicode=True).strip()
    use = _USE[content["stage"]].format(folder=content["folder"], task=content["recipe"].get("task"))
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False).strip()}\n---",
        f"# {content['name']}",
        f"Made by the hfkit stage `{content['stage']}` in {content['seconds']:.0f} seconds.",
        fenced(use, "python"),
        _body(folder, content),
        *(["![Loss over the steps](loss.png)"] if (folder / "loss.png").exists() else []),
        f"## Made from\n\n{inputs or '- no other artifact'}",
        fenced(recipe, "yaml"),
    ]
    write_file(folder / "README.md", "\n\n".join(parts) + "\n")


def _body(folder: Path, content: dict[str, Any]) -> str:
    if content["stage"] == "evaluate":
        return _evaluation(folder, content)
    if content["stage"] == "compare":
        return (folder / "report.md").read_text(encoding="utf-8").partition("\n")[2].strip()
    return _results(content["metrics"])


def _results(metrics: dict[str, Any]) -> str:
    rows = [[key, _cell(value)] for key, value in metrics.items() if isinstance(value, int | float | str)]
    return f"## Results\n\n{table(['metric', 'value'], rows)}"


def _cell(value: float | str) -> str:
    return cell(value) if isinstance(value, str) else str(value) if isinstance(value, bool) else number(value)


def _evaluation(folder: Path, content: dict[str, Any]) -> str:
    from hfkit.evaluation import report

    path = folder / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return report.card(content, [json.loads(line) for line in lines])
