"""Completions that a teacher wrote, as a data set: sequence-level distillation (Kim and Rush, arXiv 1606.07947)."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkit.artifacts import manifest
from hfkit.artifacts.cache import path_of
from hfkit.artifacts.manifest import Json
from hfkit.data import corpus
from hfkit.distillation.settings import Distillation
from hfkit.inference.generation import answers
from hfkit.runtime.cores import usable_cores
from hfkit.runtime.distributed import on_main, say


def write_generated(
    settings: Distillation,
    data_path: str,
    teacher_path: str,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Callable[[], PreTrainedModel],
    cache: Path,
) -> Path:
    """Return the folder of a data set like that at `data_path` with training completions that the teacher wrote, made
    unless it is there already. Call it on every process.

    Rows to which the teacher wrote nothing are left out; `hfkit.json` counts them and says what made the folder.

    Args:
        teacher: loads the model; called only if something is to be written.
    """
    task = settings.task
    keys = ("prompt", "completion", "messages", "tools", "chat_template")
    made_from = {
        "teacher": manifest.content_of(teacher_path),
        "data": manifest.content_of(data_path),
        "recipe": {
            "task": task.name,
            **{key: getattr(task, key) for key in keys},
            "generation": settings.generation,
            "sequence_length": settings.sequence_length,
        },
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = path_of(cache, "generated", digest)
    if on_main("generated", lambda: (folder / manifest.MANIFEST).exists()):
        return folder
    with contextlib.ExitStack() as lock:
        # Before the work, which another run may be doing.
        on_main("lock generated", lambda: lock.enter_context(manifest.locked(folder)))
        rows = list(corpus.rows(data_path, "train"))
        batch_size = 2 * settings.train.get("per_device_train_batch_size", 8)
        window = settings.sequence_length
        texts = answers(task, rows, settings.generation, teacher(), tokenizer, batch_size, window)
        answered = [task.with_answer(row, text) for row, text in zip(rows, texts, strict=True) if text]
        on_main("write generated", lambda: _write(folder, Path(data_path), answered, made_from))
    dropped = len(rows) - len(answered)
    say(f"  {len(answered):,} completions written by the teacher, {dropped:,} rows left out: {folder}")
    return folder


def _write(folder: Path, data: Path, rows: list[corpus.Row], made_from: Json) -> None:
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


def _stored(value: object) -> Any:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [corpus.stored_message(message) for message in value]
    return value
