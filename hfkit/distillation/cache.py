"""What a teacher expects at each position, on disk: it runs over the data once, and later runs never load it.

The target at position t is the teacher's distribution of token t + 1, softmax(logits / temperature); it is kept where
labels[t + 1] is learned. Only some of its entries are stored:

- `sampled`: tokens drawn from the distribution, each with its number of draws. Its share of the draws is an unbiased
  estimate of its probability, and so is the gradient of a divergence that is linear in it, such as forward KL
  (Anshumann et al., 2025, arXiv 2503.16870). The draws are made at the temperature of the loss, which is why targets
  of another temperature are other targets: shares cannot be softened afterwards.
- `top_k`: the likeliest tokens with their probabilities as they are, not scaled up to sum to 1. What is missing then
  pulls nowhere. Scaled up it would pull towards the likeliest tokens, hardest where the teacher is least sure: for a
  student that agrees with its teacher, the error of the gradient would be 1 / sum as large. Either way the targets are
  biased: a student that follows them to the end gives nothing to other tokens.

Most draws hit a token once. So the entries of a position that have a weight to store come first, and the others, which
were drawn once, are ids alone.

The rows are cut into shards, each a safetensors file with a description that holds its SHA-256. A shard is there whole
or not at all, and is the same whichever process makes it, in whichever run. `targets.json` comes last.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save

from hfkit.artifacts import manifest
from hfkit.artifacts.cache import path_of
from hfkit.artifacts.manifest import Json
from hfkit.data.rows.packing import IGNORED
from hfkit.distillation.cached_rows import TARGETS, Rows, RowsWithTargets, shard_path
from hfkit.distillation.settings import Targets
from hfkit.distillation.sparse import LogitsOf, Sparse, measure_bias, sparse
from hfkit.errors import HfkitError
from hfkit.runtime.bars import Bar
from hfkit.runtime.cores import usable_cores
from hfkit.runtime.distributed import is_main, of_all, on_main, rank, say, world_size

FORMAT = 2  # of the files, and of the draws
SHARD_TOKENS = 1 << 18  # 31 MB at 120 bytes a token
MOST_BYTES = 120  # a token, above which the report warns


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that targets depend on."""

    teacher: str
    rows: str
    row_count: int
    sequence_length: int
    method: Literal["sampled", "top_k"]
    entries: int  # draws, or k
    temperature: float
    width: int
    seed: int
    format: int = FORMAT

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def shard_rows(self) -> int:
        return max(1, SHARD_TOKENS // self.sequence_length)

    @property
    def shards(self) -> int:
        return -(-self.row_count // self.shard_rows)


def write_targets(
    load_teacher: Callable[[], LogitsOf],
    teacher: str,
    rows: Rows,
    rows_key: str,
    settings: Targets,
    temperature: float,
    width: int,
    cache: Path,
    batch_size: int,
    seed: int = 0,
) -> Path:
    """Return the folder with the targets of `rows`, made unless it is there already. Call it on every process.

    Whole shards of an earlier run are kept, damaged ones are made again. To know them all files are read once, at
    about a second of one core for a GB, or as fast as the disk is. With several processes each makes a share of the
    shards, with a whole teacher of its own; all must see one file system.

    Args:
        load_teacher: called only if something is to be made. What it returns is called without gradients.
        teacher: what identifies the teacher, such as the digest of its folder.
        rows: rows of one length, with `input_ids`, `labels` (not shifted) and perhaps `position_ids`.
        rows_key: what identifies data, split, tokenizer and length.
        temperature: of the loss that takes the targets.
        width: how many leading logits teacher and student share.

    Raises:
        HfkitError: if the teacher gives numbers that are not finite, or another run is writing the folder.
    """
    entries = settings.draws if settings.method == "sampled" else min(settings.k, width)
    length = len(rows[0]["input_ids"])
    plan = Plan(teacher, rows_key, len(rows), length, settings.method, entries, temperature, width, seed)
    folder = path_of(cache, "targets", plan.digest)
    with contextlib.ExitStack() as lock, torch.no_grad():

        def begin() -> list[int] | None:
            lock.enter_context(manifest.locked(folder))
            return _missing(folder, plan)

        missing = on_main("targets", begin)
        if missing is None:
            return folder
        share = missing[rank() :: world_size()]
        if share or is_main():
            logits_of = load_teacher()
            _make_shards(folder, plan, share, rows, logits_of, batch_size)
        of_all("shards", len(share))
        on_main("targets made", lambda: _finish(folder, plan, rows, logits_of))
    return folder


def _missing(folder: Path, plan: Plan) -> list[int] | None:
    """Return the shards that are to be made, or None if the targets are complete."""
    folder.mkdir(exist_ok=True)
    manifest.sweep(folder)
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        states = list(pool.map(lambda index: _state(folder, plan, index), range(plan.shards)))
    for index, state in enumerate(states):
        if state == "damaged":
            say(f"  targets: shard {index} is damaged: made again ({shard_path(folder, index)})")
    missing = [index for index, state in enumerate(states) if state != "whole"]
    if not missing and _is_described(folder, plan):
        return None
    (folder / TARGETS).unlink(missing_ok=True)
    if len(missing) < plan.shards:
        say(f"  targets: {plan.shards - len(missing)} of {plan.shards} shards are there already")
    return missing


def _state(folder: Path, plan: Plan, index: int) -> str:
    """Return the state of the targets: `whole`, `absent` or `damaged`."""
    path = shard_path(folder, index)
    try:
        entry = manifest.read_json(folder, f"{index:05}.json")
        if entry is None:
            return "absent"  # a kill may have left its file
        as_written = (plan.digest, path.stat().st_size, manifest.sha256_of(path))
        return "whole" if as_written == (entry["targets"], entry["size"], entry["sha256"]) else "damaged"
    except (HfkitError, OSError, KeyError):
        return "damaged"


def _is_described(folder: Path, plan: Plan) -> bool:
    """Return whether `targets.json` is there and true of the shards."""
    try:
        summary = manifest.read_json(folder, TARGETS) or {}
    except HfkitError:
        return False
    return "bias" in summary and summary == {**_summary(folder, plan), "bias": summary["bias"]}


# ---- writing


def _make_shards(
    folder: Path, plan: Plan, indices: list[int], rows: Rows, logits_of: LogitsOf, batch_size: int
) -> None:
    spans = {index: range(plan.row_count)[index * plan.shard_rows :][: plan.shard_rows] for index in indices}
    total = plan.sequence_length * sum(map(len, spans.values()))
    with Bar(desc="teacher", total=total, unit="tok", unit_scale=True, leave=True) as bar:
        for index, span in spans.items():
            # Seeded by the shard: the same draws whichever process makes it, in whichever run.
            seed = hashlib.sha256(f"{plan.seed} {index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big"))
            tokens, parts = [0], [_no_entries(plan)]
            for start in range(0, len(span), batch_size):
                batch = _collate([rows[row] for row in span[start : start + batch_size]])
                learned = (batch["labels"][:, 1:] != IGNORED).sum(1)
                tokens += learned.tolist()
                if learned.any():
                    for logits in logits_of(batch):
                        parts.append(sparse(logits, plan.method, plan.entries, plan.temperature, generator))
                bar.update(batch["labels"].numel())
            _write_shard(folder, plan, index, np.cumsum(tokens), parts)


def _collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _no_entries(plan: Plan) -> Sparse:
    """Return no entries, in the types that are stored."""
    return Sparse(
        ids=np.zeros(0, np.uint16 if plan.width <= 1 << 16 else np.uint32),
        weights=np.zeros(0, np.uint8 if plan.method == "sampled" else np.float16),
        sizes=np.zeros(0, np.uint8 if plan.entries < 1 << 8 else np.uint16),
    )


def _write_shard(folder: Path, plan: Plan, index: int, first_token: np.ndarray, parts: list[Sparse]) -> None:
    """Write `parts`; of each position how many of its entries are `weighted`, which stand first; and `row_starts`,
    int64 (rows + 1, 3): the first token, the first entry and the first weight of each row."""
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts], dtype=empty.dtype, casting="unsafe")
        for name, empty in _no_entries(plan)._asdict().items()
    }
    is_alone = arrays["weights"] == 1 if plan.method == "sampled" else np.zeros(len(arrays["weights"]), bool)
    owners = np.repeat(np.arange(len(arrays["sizes"])), arrays["sizes"])
    order = np.argsort(2 * owners + is_alone, kind="stable")
    arrays["ids"], arrays["weights"] = arrays["ids"][order], arrays["weights"][order][~is_alone[order]]
    weighted = np.bincount(owners[~is_alone], minlength=len(arrays["sizes"]))
    arrays["weighted"] = weighted.astype(arrays["sizes"].dtype)
    starts = [np.concatenate([[0], np.cumsum(arrays[name], dtype=np.int64)]) for name in ("sizes", "weighted")]
    content = save(
        {**arrays, "row_starts": np.stack([first_token, *(offsets[first_token] for offsets in starts)], axis=1)}
    )
    manifest.write_file(shard_path(folder, index), content)
    entry = {
        "targets": plan.digest,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    manifest.write_json(folder / f"{index:05}.json", entry)


def _finish(folder: Path, plan: Plan, rows: Rows, logits_of: LogitsOf) -> None:
    """Write `targets.json`, and say what the targets cost and how good they are."""
    summary = _summary(folder, plan)
    manifest.write_json(folder / TARGETS, summary)
    summary["bias"] = measure_bias(logits_of, RowsWithTargets(rows, folder), plan.temperature)
    manifest.write_json(folder / TARGETS, summary)
    entries, size, apart = summary["entries_per_token"], summary["bytes_per_token"], summary["bias"]["total_variation"]
    say(f"  targets: {summary['tokens']:,} tokens, {entries:.1f} entries and {size:.1f} bytes each ({folder})")
    if apart:
        steps = zip(apart, summary["bias"]["positions"], strict=True)
        distances = ", ".join(f"{distance:.4f} over {count:,}" for distance, count in steps)
        say(f"  mean target to mean distribution: {distances} tokens; without bias like 1/sqrt(tokens)")
    if size > MOST_BYTES:
        say(f"  WARNING: more than {MOST_BYTES} bytes a token; fewer draws, or a smaller k, take less")


def _summary(folder: Path, plan: Plan) -> Json:
    """Return what `targets.json` says, but for the bias."""
    sizes = [safe_open(shard_path(folder, index), "numpy").get_tensor("sizes") for index in range(plan.shards)]
    tokens, entries = sum(map(len, sizes)), sum(int(array.sum(dtype=np.int64)) for array in sizes)
    size = sum(shard_path(folder, index).stat().st_size for index in range(plan.shards))
    return {
        **dataclasses.asdict(plan),
        "shard_rows": plan.shard_rows,
        "tokens": tokens,
        "most_entries": max(int(array.max(initial=0)) for array in sizes),
        "entries_per_token": entries / max(tokens, 1),
        "bytes": size,
        "bytes_per_token": size / max(tokens, 1),
    }
