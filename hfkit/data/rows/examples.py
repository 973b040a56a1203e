"""The examples of a task as token ids, memory-mapped; packed into rows for training."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hfkit.artifacts import manifest
from hfkit.artifacts.cache import cached, path_of
from hfkit.artifacts.manifest import Json
from hfkit.data import corpus
from hfkit.data.rows.packing import IGNORED
from hfkit.data.tasks import Task
from hfkit.errors import HfkitError
from hfkit.runtime.bars import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST = "examples.json"  # written last


class Examples(torch.utils.data.Dataset):
    """The examples of a split. One is `input_ids` and `labels`, each (tokens,). Of a class, `labels` is its number; of
    any number of classes it is (classes,), float32, 1 for those that the row has.

    Attributes:
        labels: names of the classes, if the task has classes.
        is_multi_label: whether a row has any number of them.
        counts: `rows` of the data, `examples`, of which some may be of one row, `cut` (part of the prompt is gone) and
            `dropped` (rows whose completion alone does not fit).
        bytes: of the text that is learned.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        entry = json.loads((folder / LAST).read_text(encoding="utf-8"))
        self.labels: list[str] | None = entry["labels"]
        self.counts: dict[str, int] = entry["splits"][split]
        self.bytes = self.counts["bytes"]
        self.ids = np.memmap(folder / f"{split}.ids", dtype=np.uint32, mode="r")
        self.learned = np.memmap(folder / f"{split}.learned", dtype=np.bool_, mode="r")
        self.starts = np.load(folder / f"{split}.starts.npy")  # of each example, and the end
        self.classes = np.load(folder / f"{split}.classes.npy")
        self.is_multi_label = self.classes.ndim == 2
        self.tokens = int(self.starts[-1])

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return Examples, (self.folder, self.split)  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = slice(self.starts[index], self.starts[index + 1])
        ids = torch.from_numpy(self.ids[piece].astype(np.int64))
        if self.labels is not None:
            classes = self.classes[index]
            return {"input_ids": ids, "labels": torch.tensor(classes.astype(np.float32) if classes.ndim else classes)}
        return {"input_ids": ids, "labels": ids.masked_fill(torch.from_numpy(~self.learned[piece]), IGNORED)}


class PackedExamples(torch.utils.data.Dataset):
    """Rows of `length` tokens that hold as many examples as fit, the longest first (best fit decreasing).

    A row is `input_ids`, `labels` and `position_ids`, each (length,). Positions begin anew at each example, which is
    how transformers recognises them and lets none attend to another; the rest is padding, never learned.
    """

    def __init__(self, examples: Examples, length: int, pad_token_id: int):
        self.examples, self.sequence_length, self.pad_token_id = examples, length, pad_token_id
        self.bytes = examples.bytes
        self.rows = best_fit(np.diff(examples.starts).tolist(), length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {
            "input_ids": torch.full((self.sequence_length,), self.pad_token_id),
            "labels": torch.full((self.sequence_length,), IGNORED),
            "position_ids": torch.zeros(self.sequence_length, dtype=torch.int64),
        }
        used = 0
        for number in self.rows[index]:
            example = self.examples[number]
            piece = slice(used, used + len(example["input_ids"]))
            row["input_ids"][piece] = example["input_ids"]
            row["labels"][piece] = example["labels"]
            row["labels"][used] = IGNORED  # the example before does not predict this one's first token
            row["position_ids"][piece] = torch.arange(len(example["input_ids"]))
            used = piece.stop
        return row


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Return indices of pieces in rows of `room`: each, from the longest on, into the row that it fills best."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free places -> rows that have so many
    free_sizes = [False] * (room + 1)
    for index in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        size = lengths[index]
        free = next((free for free in range(size, room + 1) if free_sizes[free]), None)
        if free is None:
            row = len(rows)
            rows.append([])
            free = room
        else:
            row = by_room[free].pop()
            free_sizes[free] = bool(by_room[free])
        rows[row].append(index)
        by_room.setdefault(free - size, []).append(row)
        free_sizes[free - size] = True
    return rows


def task_examples(path: str, task: Task, tokenizer: "PreTrainedTokenizerBase", length: int, cache: Path) -> Path:
    """Return the folder with the encoded examples of all splits of the data at `path`, made unless it is there
    already.

    Call it on the main process only.

    Raises:
        HfkitError: if nothing is left to learn, or a class of validation or test is unknown in training.
    """
    digest = hashlib.sha256(manifest.content_of(path).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    said = [task.name, task.prompt, task.completion, task.messages, task.tools, task.label]
    digest.update(json.dumps([said, length, tokenizer.chat_template, tokenizer.eos_token_id]).encode())

    def make(work: Path) -> None:
        labels = _labels(path, task) if task.has_classes else None
        splits = {split: _encode_split(path, split, task, tokenizer, length, labels, work) for split in corpus.SPLITS}
        manifest.write_json(work / LAST, {"labels": labels, "splits": splits})

    return cached(path_of(cache, "examples", digest.hexdigest()), LAST, make)


def _labels(path: str, task: Task) -> list[str]:
    """Return the classes of the training split, in the order of their names; numbers in their own order."""
    labels, has_lists = {}, False
    for split in corpus.SPLITS:
        labels[split] = set[str]()
        for row in corpus.rows(path, split):
            labels[split] |= {*task.references(row)}
            has_lists |= isinstance(row[task.label], list)
    for split in ("validation", "test"):
        if unseen := sorted(labels[split] - labels["train"]):
            raise HfkitError(
                f"label: the {split} split has classes that training never sees: {', '.join(unseen[:5])}; "
                f"give more data, or leave these out"
            )
    if not labels["train"]:
        raise HfkitError("label: no row of the train split has a class; give rows that have, or name another column")
    if len(labels["train"]) < 2 and not has_lists:
        (only,) = labels["train"]
        raise HfkitError(
            f"label: the train split has one class only, {only!r}, so that there is nothing to learn; give rows of "
            f"another class, or name another column"
        )
    return sorted(labels["train"], key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _numbers_of(task: Task, row: corpus.Row, labels: list[str]) -> int | list[bool]:
    """Return the number of a row's class, or of a list of classes a vector of whether each is among them."""
    classes = task.references(row)
    is_list = isinstance(row[task.label], list)
    return [label in classes for label in labels] if is_list else labels.index(classes[0])


def _encode_split(
    path: str,
    split: str,
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    labels: list[str] | None,
    work: Path,
) -> dict[str, int]:
    """Write one split's files. Returns its counts."""
    starts, classes = [0], list[int | list[bool]]()
    counts = {"rows": 0, "examples": 0, "cut": 0, "dropped": 0, "learned_tokens": 0, "bytes": 0}
    rows = Bar(corpus.rows(path, split), f"encoding {split}")
    with (work / f"{split}.ids").open("wb") as ids_file, (work / f"{split}.learned").open("wb") as learned_file:
        for number, values in enumerate(rows, 1):
            try:
                examples = task.encode(values, tokenizer, length)
            except HfkitError as error:
                raise HfkitError(f"{path}: row {number} of the {split} split: {error}") from None
            counts["rows"] += 1
            counts["dropped"] += not examples
            for example in examples:
                ids_file.write(np.asarray(example.ids, dtype=np.uint32).tobytes())
                learned_file.write(np.asarray(example.learned, dtype=np.bool_).tobytes())
                starts.append(starts[-1] + len(example.ids))
                classes.append(_numbers_of(task, values, labels) if labels else 0)
                counts["examples"] += 1
                counts["cut"] += example.is_cut
                counts["learned_tokens"] += sum(example.learned)
                counts["bytes"] += len(tokenizer.decode(example.learned_ids, skip_special_tokens=True).encode())
    np.save(work / f"{split}.starts.npy", np.asarray(starts, dtype=np.int64))
    np.save(work / f"{split}.classes.npy", np.asarray(classes, dtype=bool if np.ndim(classes) == 2 else np.int64))
    if not counts["learned_tokens"]:
        raise HfkitError(
            f"data: the {split} split of {path} leaves nothing to learn ({counts['dropped']} rows do not fit into "
            f"sequence_length={length}); raise sequence_length or give more data"
        )
    return counts


def counted(counts: dict[str, int], length: int) -> str:
    """Return the counts of a split, for a person."""
    examples, cut, dropped = (f"{counts[name]:,}" for name in ("examples", "cut", "dropped"))
    text = f"  {examples} examples, {cut} cut to {length} tokens, {dropped} dropped"
    if counts["examples"] <= counts["rows"]:
        return text
    cost = f"{examples} of {counts['rows']:,} chats"
    return f"{text}\n  each answer is an example with the context that it would be written in: {cost}"


def pad(batch: list[Json], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return examples as one batch, padded on the right: `input_ids` and `attention_mask` (batch, longest), and the
    `labels`, (batch, longest) of tokens, (batch,) of classes or (batch, classes) of multi-label ones."""

    def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = [example["input_ids"] for example in batch]
    labels = [example["labels"] for example in batch]
    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        "labels": padded(labels, IGNORED) if _are_of_tokens(labels[0]) else torch.stack(labels),
    }


def _are_of_tokens(labels: torch.Tensor) -> bool:
    """Return whether labels are those of tokens: of one class they are a number, of several a vector of floats."""
    return labels.dim() > 0 and not labels.is_floating_point()


def show_example(example: dict[str, torch.Tensor], tokenizer: "PreTrainedTokenizerBase", tokens: int = 60) -> str:
    """Return the end of an example for a person: `[...]` is context that is not learned."""
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    if not _are_of_tokens(example["labels"]):
        several = [number for number, is_so in enumerate(labels) if is_so] if isinstance(labels, list) else None
        classes = f"class {labels}" if several is None else f"classes {', '.join(map(str, several)) or 'none'}"
        return f"  first example, of {classes}: {tokenizer.decode(ids[:tokens])!r}"
    learned = sum(label != IGNORED for label in labels)
    shown = []
    for token_id, label in list(zip(ids, labels, strict=True))[-tokens:]:
        text = tokenizer.decode([token_id]).replace("\n", "\\n")
        shown.append(f"[{text}]" if label == IGNORED else text)
    return f"  first example, {learned} of {len(ids)} tokens learned: ... {''.join(shown)}"
