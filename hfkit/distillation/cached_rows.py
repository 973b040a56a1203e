"""Training rows with the teacher's targets beside them, read from a cache that `hfkit.distillation.cache` has made."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from hfkit.artifacts import manifest
from hfkit.data.rows.examples import PackedExamples
from hfkit.data.rows.packing import IGNORED, PackedRows
from hfkit.errors import HfkitError

TARGETS = "targets.json"

Rows = PackedRows | PackedExamples


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.safetensors"


class RowsWithTargets(torch.utils.data.Dataset):
    """Rows with their targets, memory-mapped. A row has besides, where position t holds what is expected of t + 1:

    `target_ids`, int64 (sequence_length, most_entries), and
    `target_probabilities`, float32 (sequence_length, most_entries), 0 where there is no entry.

    Raises:
        HfkitError: if the folder holds no finished targets, or those of other rows.
    """

    def __init__(self, rows: Rows, folder: Path):
        self.rows, self.folder = rows, folder
        targets = manifest.read_json(folder, TARGETS)
        if targets is None:
            raise HfkitError(f"{folder}: holds no finished targets; run the recipe that makes them to its end")
        self.sequence_length: int = targets["sequence_length"]
        own, other = (len(rows), len(rows[0]["input_ids"])), (targets["row_count"], self.sequence_length)
        if own != other:
            rule = f"holds targets of {other[0]} rows of {other[1]} tokens, got {own[0]} rows of {own[1]}"
            raise HfkitError(f"{folder}: {rule}; let them be made for these rows")
        self.most_entries: int = targets["most_entries"]
        self.shard_rows: int = targets["shard_rows"]
        self.scale: int = targets["entries"] if targets["method"] == "sampled" else 1
        self.shards: dict[int, Any] = {}  # those that have been opened

    def __reduce__(self) -> tuple[type, tuple[Rows, Path]]:
        return RowsWithTargets, (self.rows, self.folder)  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        positions = np.flatnonzero(row["labels"][1:].numpy() != IGNORED)  # (tokens,)
        ids = np.zeros((self.sequence_length, self.most_entries), np.int64)
        probabilities = np.zeros((self.sequence_length, self.most_entries), np.float32)
        shard, starts = self._shard(index // self.shard_rows)
        (token, entry, weight), (token_end, entry_end, weight_end) = starts[index % self.shard_rows :][:2].tolist()
        if token_end - token != len(positions):
            raise HfkitError(f"{self.folder}: row {index} learns other tokens than its targets; delete the folder")
        if len(positions):
            sizes = shard.get_slice("sizes")[token:token_end].astype(np.int64)
            of_token = np.repeat(positions, sizes)  # (entries,)
            slots = np.arange(entry_end - entry) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            ids[of_token, slots] = shard.get_slice("ids")[entry:entry_end]
            weights = np.ones(entry_end - entry, np.float32)
            weighted = shard.get_slice("weighted")[token:token_end]
            weights[slots < np.repeat(weighted, sizes)] = shard.get_slice("weights")[weight:weight_end]
            probabilities[of_token, slots] = weights
        targets = {"ids": torch.from_numpy(ids), "probabilities": torch.from_numpy(probabilities) / self.scale}
        return {**row, **{f"target_{name}": value for name, value in targets.items()}}

    def _shard(self, index: int) -> tuple[Any, np.ndarray]:
        """Return a shard's file and its `row_starts`."""
        if index not in self.shards:
            file = safe_open(shard_path(self.folder, index), "numpy")
            self.shards[index] = file, file.get_tensor("row_starts")
        return self.shards[index]
