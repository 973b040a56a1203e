"""Completions that a teacher wrote, as a data set: sequence-level distillation (Kim and Rush, arXiv 1606.07947)."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.artifacts import manifest
from hfkit.data import corpus
from hfkit.data.tasks import fields_of
from hfkit.inference.generation import answers
from hfkit.runtime.cores import usable_cores
from hfkit.runtime.distributed import on_main, say


def write_generated(
    recipe: Any, places: dict[str, str], tokenizer: PreTrainedTokenizerBase, teacher: Callable[[], Any], cache: Path
) -> Path:
    """The folder of a data set like the recipe's, whose training completions the teacher wrote, made unless it is
    there already. Call it on every process.

    Rows to which the teacher wrote nothing are left out; `hfkit.json` counts them and says what made the folder.

    Args:
        teacher: loads the model; called only if something is to be written.
    """
    keys = ("task", "prompt", "completion", "messages", "tools", "chat_template", "generation", "sequence_length")
    made_from = {
        "teacher": manifest.content_of(places["teacher"]),
        "data": manifest.content_of(places["data"]),
        "recipe": {key: getattr(recipe, key) for key in keys},
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = cache / f"generated-{digest[:16]}"
    if on_main("generated", lambda: (folder / manifest.MANIFEST).exists()):
        return folder
    with contextlib.ExitStack() as lock:
        # Before the work, which another run may be doing.
        on_main("lock generated", lambda: lock.enter_context(manifest.locked(folder)))
        rows = list(corpus.rows(places["data"], "train"))
        batch_size = 2 * recipe.train.get("per_device_train_batch_size", 8)
        written = answers(recipe, rows, teacher(), tokenizer, batch_size, recipe.sequence_length)
        kept = [_with_completion(recipe, row, text) for row, text in zip(rows, written, strict=True) if text]
        on_main("write generated", lambda: _write(folder, Path(places["data"]), kept, made_from))
    say(f"  {len(kept):,} completions written by the teacher, {len(rows) - len(kept):,} rows left out: {folder}")
    return folder


def _with_completion(recipe: Any, row: dict[str, Any], text: str) -> dict[str, Any]:
    """The row with another completion: of a chat, another last answer."""
    if recipe.task == "generate":
        return {**row, fields_of(recipe.completion)[0]: text}
    turns = row[recipe.messages]
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    return {**row, recipe.messages: [*turns[:last], {"role": "assistant", "content": text}]}


def _write(folder: Path, data: Path, rows: list[dict[str, Any]], made_from: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    with manifest.new_folder(folder) as work:
        for split in ("validation", "test"):
            shutil.copyfile(data / f"{split}.parquet", work / f"{split}.parquet")
        schema = pyarrow.parquet.read_schema(data / "train.parquet")
        stored = [{name: _stored(value) for name, value in row.items()} for row in rows]
        table = pyarrow.Table.from_pylist(stored, schema=schema)
        pyarrow.parquet.write_table(table, work / "train.parquet", compression="zstd")
        content = {"name": "generated", "stage": "prepare", "made_from": made_from, "metrics": {"rows": len(rows)}}
        fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        hardware = {"cpu_count": usable_cores()}
        manifest.finish(work, {**content, "fingerprint": fingerprint, "inputs": {}, "hardware": hardware})


def _stored(value: Any) -> Any:
    is_chat = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return [corpus.stored_message(message) for message in value] if is_chat else value
