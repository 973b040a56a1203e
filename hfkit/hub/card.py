"""The `README.md` of a folder: what it is, how it was made, how good it is, how to use it."""

from pathlib import Path
from typing import Any

import yaml

from hfkit.manifest import write_file

_USE = {
    "tokenizer": """from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
print(tokenizer.tokenize("def main():"))""",
    "pretrain": """from transformers import pipeline

generate = pipeline("text-generation", "{folder}", trust_remote_code=True)
print(generate("def main():", max_new_tokens=40)[0]["generated_text"])""",
    "finetune": """from hfkit.model.loading import load_model

model = load_model("{folder}", task="{task}")  # the base model, and the adapter if there is one""",
    "evaluate": """import json

for line in open("{folder}/predictions.jsonl"):
    print(json.loads(line)["prediction"])""",
    "prepare": """from datasets import load_dataset

data = load_dataset("parquet", data_files={{"train": "{folder}/train.parquet"}})
print(data["train"][0]["text"])""",
}


def write_card(folder: Path, content: dict[str, Any]) -> None:
    """Write the card of a folder from what its manifest will say (`runner._content`, seconds and metrics)."""
    metadata: dict[str, Any] = {"tags": ["hfkit"]}
    if content["stage"] == "pretrain":
        metadata = {"library_name": "transformers", "pipeline_tag": "text-generation", **metadata}
    if content["stage"] == "finetune":
        is_adapter, is_classifier = content["recipe"]["lora"] is not None, content["recipe"]["task"] == "classify"
        metadata = {
            "library_name": "peft" if is_adapter else "transformers",
            "pipeline_tag": "text-classification" if is_classifier else "text-generation",
            "base_model": content["inputs"]["model"]["place"],
            **metadata,
        }
    name = content["name"]
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in content["metrics"].items() if _is_cell(value))
    inputs = "\n".join(
        f"- {key}: `{entry['place']}`" + (f", sha256 `{entry['digest'][:16]}`" if entry["digest"] else "")
        for key, entry in content["inputs"].items()
    )
    picture = "![Loss over the steps](loss.png)\n\n" if (folder / "loss.png").exists() else ""
    recipe = yaml.safe_dump(content["made_from"]["recipe"], sort_keys=False, allow_unicode=True).strip()
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {name}

Made by the hfkit stage `{content["stage"]}` in {content["seconds"]:.0f} seconds.

```python
{_USE[content["stage"]].format(folder=content["folder"], task=content["recipe"].get("task"))}
```

## Results

| metric | value |
| --- | --- |
{rows}

{picture}## Made from

{inputs or "- no other artifact"}

```yaml
{recipe}
```
"""
    write_file(folder / "README.md", text)


def _is_cell(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
