"""A model to be made smaller, with all its weights in one folder."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import is_adapter
from hfkit.data.tasks import Task
from hfkit.data.tokenizer import load_tokenizer
from hfkit.model import adapters
from hfkit.model.loading import base_quantization
from hfkit.runtime.distributed import say


@contextlib.contextmanager
def whole(path: str, task: Task, beside: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Open a folder or id of the model; an adapter is merged into its base, in a folder that is there for so long.

    Yields:
        The place, and the `merge_drift` of an adapter, see `adapters.merge`.
    """
    if not is_adapter(path):
        yield path, {}
        return
    folder = beside / f".merged{manifest.PARTIAL}"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = load_tokenizer(path, task.tokenizer_use, task.chat_template)
    ids = torch.arange(adapters.DRIFT_TOKENS)[None] % len(tokenizer)
    drift = adapters.merge(Path(path), folder, task.has_classes, base_quantization(path), ids)
    tokenizer.save_pretrained(folder)
    say(f"  the adapter is merged into its base: its logits are off by {drift:.2g} of what it changes in the base's")
    try:
        yield str(folder), {"merge_drift": drift}
    finally:
        shutil.rmtree(folder)
