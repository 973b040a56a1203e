"""Rows that teacher and student tokenize differently, with the places where both predict the same text."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hfkit.artifacts import manifest
from hfkit.artifacts.cache import cached, path_of
from hfkit.data import corpus
from hfkit.data.corpus import Row
from hfkit.data.rows.examples import pad
from hfkit.data.rows.packing import IGNORED
from hfkit.data.tasks import Task
from hfkit.distillation.vocabulary import aligned, ids_before
from hfkit.errors import HfkitError
from hfkit.runtime.bars import Bar

MOST_CHARACTERS = 16  # a token, looked at for a row: a document would else be tokenized once a row
FILES = {"ids": np.int32, "learned": np.bool_, "partner": np.int32, "teacher_ids": np.int32}
LAST = "aligned.json"  # written last
FORMAT = 2  # of the files


class AlignedRows(torch.utils.data.Dataset):
    """One text a row. A row is `input_ids`, `labels` and `partner`, each (tokens,), and `teacher_ids`, (its tokens,).

    `partner` is the teacher's position that predicts from the same place of the text, -1 where there is none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = {name: np.memmap(folder / name, dtype, "r") for name, dtype in FILES.items()}
        self.starts = np.load(
            folder / "starts.npy", mmap_mode="r"
        )  # (rows + 1, 2): of the student's ids, the teacher's

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return AlignedRows, (self.folder,)  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        (own, other), (end, other_end) = self.starts[index : index + 2]
        ids = torch.from_numpy(self.files["ids"][own:end].astype(np.int64))
        learned = torch.from_numpy(np.array(self.files["learned"][own:end]))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(~learned, IGNORED),
            "partner": torch.from_numpy(self.files["partner"][own:end].astype(np.int64)),
            "teacher_ids": torch.from_numpy(self.files["teacher_ids"][other:other_end].astype(np.int64)),
        }


def collate(rows: list[dict[str, torch.Tensor]], pad_token_id: int, plain: Any) -> dict[str, torch.Tensor]:
    """Return aligned rows as one batch, padded on the right; `partner` then counts through all of the teacher's
    positions. Rows of another kind, such as those of an evaluation, are for `plain`."""
    if "partner" not in rows[0]:
        return plain(rows)
    batch = pad(rows, pad_token_id)
    theirs = [row["teacher_ids"] for row in rows]
    teacher_ids = pad_sequence(theirs, batch_first=True)
    mask = pad_sequence([torch.ones_like(ids) for ids in theirs], batch_first=True)
    partner = pad_sequence([row["partner"] for row in rows], batch_first=True, padding_value=-1)
    first = torch.arange(len(rows))[:, None] * teacher_ids.shape[1]
    partners = torch.where(partner >= 0, partner + first, -1)
    return {**batch, "partner": partners, "teacher_input_ids": teacher_ids, "teacher_attention_mask": mask}


def aligned_rows(
    task: Task,
    length: int,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    cache: Path,
) -> Path:
    """Return the folder with the training rows of a data set, tokenized for both, made unless it is there already.

    Long documents are cut so that neither has more than `length` tokens. Call it on the main process only.

    Raises:
        HfkitError: if no row is left.
    """
    digest = hashlib.sha256(manifest.content_of(path).encode())
    for side in (tokenizer, teacher_tokenizer):
        digest.update(f"{side.backend_tokenizer.to_str()} {side.bos_token_id} {side.eos_token_id}".encode())
    digest.update(json.dumps([FORMAT, task.name, task.prompt, task.completion, length]).encode())
    write = partial(
        _write, task=task, length=length, path=path, tokenizer=tokenizer, teacher_tokenizer=teacher_tokenizer
    )
    return cached(path_of(cache, "aligned", digest.hexdigest()), LAST, write)


def _write(
    work: Path,
    task: Task,
    length: int,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the rows one by one, so that no more than one is in memory."""
    starts, paired = [(0, 0)], 0
    rows = Bar(corpus.rows(path, "train"), "aligning train")
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((work / name).open("wb")) for name in FILES}
        for values in rows:
            for ids, teacher_ids, pairs, learned_from in _texts(task, length, values, tokenizer, teacher_tokenizer):
                partner = np.full(len(ids), -1)
                partner[pairs[:, 0]] = pairs[:, 1]
                learned = np.arange(len(ids)) >= learned_from
                row = {"ids": ids, "learned": learned, "partner": partner, "teacher_ids": teacher_ids}
                for name, column in row.items():
                    files[name].write(np.asarray(column, dtype=FILES[name]).tobytes())
                starts.append((starts[-1][0] + len(ids), starts[-1][1] + len(teacher_ids)))
                paired += len(pairs)
    if len(starts) == 1:
        raise HfkitError(f"data: no row of {path} fits into sequence_length={length} for both tokenizers; raise it")
    np.save(work / "starts.npy", np.array(starts))
    manifest.write_json(work / LAST, {"tokens": starts[-1][0], "pairs": paired})


def _texts(
    task: Task,
    length: int,
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[list[int], list[int], np.ndarray, int]]:
    """Yield both ids of each text of a row, the pairs, and the first of the student's tokens that is learned."""
    if task.has_answers:
        prompt, answer = task.prompt_and_answer(row)
        ids, teacher_ids, pairs = aligned(answer, tokenizer, teacher_tokenizer, prompt)
        if max(len(ids), len(teacher_ids)) <= length and len(pairs):
            yield ids, teacher_ids, pairs, len(ids_before(prompt, tokenizer))
        return
    rest = row["text"]
    while rest:
        text = rest[: MOST_CHARACTERS * length]
        is_end = text == rest
        while True:
            ids, teacher_ids, pairs = aligned(text, tokenizer, teacher_tokenizer)
            longest = max(len(ids), len(teacher_ids))
            if longest <= length:
                break
            text, is_end = text[: max(1, len(text) * (length - 2) // longest)], False
        if not is_end:  # what follows is more of the document, not its end
            ids, teacher_ids, pairs = ids[:-1], teacher_ids[:-1], pairs[:-1]
        if len(pairs):
            yield ids, teacher_ids, pairs, 1
        rest = rest[len(text) :]


def add_alignment(data: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Let the student learn from aligned rows."""
    data.train = AlignedRows(folder)
    data.collate = partial(collate, pad_token_id=tokenizer.pad_token_id, plain=data.collate)
    counts = manifest.read_json(folder, LAST) or {}
    data.facts = {"aligned_share": counts["pairs"] / counts["tokens"]}
