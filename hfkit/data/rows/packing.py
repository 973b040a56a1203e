"""Tokenized documents as memory-mapped rows of a fixed length.

A split is stored as two flat files: `<split>.tokens`, the rows of `sequence_length` ids, and `<split>.pieces`, the
lengths of the pieces that make up each row. A piece is a stretch of one document. Positions begin anew at every piece,
which is how transformers recognises packed documents and builds the block mask; the first token of a piece is never
predicted. A document that does not fit in a row goes on in the next, where its last token stands again as context, so
that every token after the first is predicted exactly once: token sums over a split are sums over its text.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hfkit.artifacts import manifest
from hfkit.artifacts.cache import cached, path_of
from hfkit.data import corpus
from hfkit.data.encoding import Encode, bulk_encoder
from hfkit.errors import HfkitError
from hfkit.runtime.bars import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST = "tokens.json"  # written last
IGNORED = -100
BATCH_BYTES = 1 << 20
PROBE_TEXTS, PROBE_CHARACTERS = 200, 10_000  # on which a fast encoder must agree with the tokenizer


class PackedRows(torch.utils.data.Dataset):
    """The rows of a split. A row is `input_ids`, `labels` and `position_ids`, each (sequence_length,), int64.

    Concatenated rows have no `position_ids`: plain causal attention needs no mask, and is faster without.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        entry = json.loads((folder / LAST).read_text(encoding="utf-8"))
        self.sequence_length: int = entry["sequence_length"]
        self.is_masked: bool = entry["packing"] == "documents"
        self.bytes: int = entry["splits"][split]["bytes"]  # of text behind the predicted tokens
        self.predicted_tokens: int = entry["splits"][split]["predicted_tokens"]
        self.tokens = np.memmap(folder / f"{split}.tokens", dtype=entry["dtype"], mode="r")
        self.pieces = np.memmap(folder / f"{split}.pieces", dtype=np.uint32, mode="r")
        self.row_starts = np.load(folder / f"{split}.row_starts.npy")  # first piece of each row, and the end

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return PackedRows, (self.folder, self.split)  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = self.sequence_length
        input_ids = torch.from_numpy(self.tokens[index * length : (index + 1) * length].astype(np.int64))
        pieces = self.pieces[self.row_starts[index] : self.row_starts[index + 1]]
        starts = np.repeat(np.cumsum(pieces, dtype=np.int64) - pieces, pieces)
        position_ids = torch.from_numpy(np.arange(length) - starts)
        labels = input_ids.masked_fill(position_ids == 0, IGNORED)
        row = {"input_ids": input_ids, "labels": labels}
        return {**row, "position_ids": position_ids} if self.is_masked else row


def token_rows(
    path: str, tokenizer: "PreTrainedTokenizerBase", sequence_length: int, packing: str, cache: Path
) -> Path:
    """Return the folder with the packed rows of all splits of the data at `path`, made unless it is there already.

    The folder's name contains data, tokenizer, length and packing. Call it on the main process only.

    Raises:
        HfkitError: if a split has less than one row of tokens.
    """

    def make(work: Path) -> None:
        dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
        probe = [text[:PROBE_CHARACTERS] for text in islice(corpus.texts(path, "train"), PROBE_TEXTS)]
        encode, encoder = bulk_encoder(tokenizer, probe)
        splits = {}
        for split in corpus.SPLITS:
            splits[split] = _pack_split(path, split, tokenizer, encode, sequence_length, packing, dtype, work)
        content = {"sequence_length": sequence_length, "packing": packing, "dtype": dtype, "splits": splits}
        content["encoder"] = encoder
        manifest.write_json(work / LAST, content)

    return cached(folder_of(path, tokenizer, sequence_length, packing, cache), LAST, make)


def folder_of(
    path: str, tokenizer: "PreTrainedTokenizerBase", sequence_length: int, packing: str, cache: Path
) -> Path:
    """Return where the packed rows of data are, or would be."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    digest = hashlib.sha256()
    digest.update(manifest.content_of(path).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id} {sequence_length} {packing}".encode())
    return path_of(cache, "tokens", digest.hexdigest())


def _pack_split(
    path: str,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    encode: Encode,
    sequence_length: int,
    packing: str,
    dtype: str,
    work: Path,
) -> dict[str, int]:
    """Write one split's files. Returns its counts."""
    row_starts, predicted = [0], 0
    counts = {"documents": 0, "bytes": 0}
    documents = _tokenize(corpus.texts(path, split), tokenizer, encode, counts, f"tokenizing {split}")
    rows = pack(documents, sequence_length, packing == "concatenate", tokenizer.pad_token_id)
    with (work / f"{split}.tokens").open("wb") as tokens_file, (work / f"{split}.pieces").open("wb") as pieces_file:
        for row, pieces in rows:
            tokens_file.write(row.astype(dtype).tobytes())
            pieces_file.write(np.asarray(pieces, dtype=np.uint32).tobytes())
            row_starts.append(row_starts[-1] + len(pieces))
            predicted += sequence_length - len(pieces)  # all but the first token of each piece
    np.save(work / f"{split}.row_starts.npy", np.asarray(row_starts, dtype=np.int64))
    if not predicted:
        raise HfkitError(f"data: the {split} split of {path} has no text; prepare more documents")
    if split == "train" and predicted < sequence_length - 1:
        raise HfkitError(
            f"sequence_length={sequence_length}: the train split of {path} has only {predicted} tokens to predict, "
            f"less than one row; prepare more documents or shorten sequence_length"
        )
    return {**counts, "rows": len(row_starts) - 1, "predicted_tokens": predicted}


def pack(
    documents: Iterator[np.ndarray], length: int, concatenate: bool, pad_token_id: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Fill rows of `length` with documents. Yields each row, (length,), and the lengths of its pieces.

    With `concatenate` the documents of a row make one piece. What stays empty is padding, in pieces of one token, none
    of which is ever predicted.
    """
    row, used, pieces = np.full(length, pad_token_id, dtype=np.int64), 0, list[int]()
    for ids in documents:
        start = 0
        while start < len(ids) - 1:
            if used >= length - 1:
                yield row, pieces + [1] * (length - used)
                row, used, pieces = np.full(length, pad_token_id, dtype=np.int64), 0, []
            taken = min(length - used, len(ids) - start)
            row[used : used + taken] = ids[start : start + taken]
            if concatenate and pieces:
                pieces[-1] += taken
            else:
                pieces.append(taken)
            used, start = used + taken, start + taken - 1
    if used:
        yield row, pieces + [1] * (length - used)


def _tokenize(
    texts: Iterator[str],
    tokenizer: "PreTrainedTokenizerBase",
    encode: Encode,
    counts: dict[str, int],
    title: str,
) -> Iterator[np.ndarray]:
    """Yield each document as ids between its BOS and its EOS. `counts` grows by the documents and bytes of text
    seen."""
    before = np.array([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [], np.int64)
    after = np.array([tokenizer.eos_token_id])
    with Bar(desc=title, unit="B", unit_scale=True, leave=True) as bar:
        for batch, size in _batches(texts):
            for ids in encode(batch):
                yield np.concatenate([before, ids, after])
            counts["documents"] += len(batch)
            counts["bytes"] += size
            bar.update(size)


def _batches(texts: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """Yield lists of texts of about BATCH_BYTES together, each with its size in bytes of UTF-8."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def show_row(row: dict[str, torch.Tensor], tokenizer: "PreTrainedTokenizerBase", tokens: int = 24) -> str:
    """Return the beginning of a row for a person: `[...]` is context that is not predicted."""
    shown = []
    for token_id, label in zip(row["input_ids"][:tokens].tolist(), row["labels"][:tokens].tolist(), strict=True):
        text = tokenizer.decode([token_id]).replace("\n", "\\n")
        shown.append(f"[{text}]" if label == IGNORED else text)
    predicted = int((row["labels"] != IGNORED).sum())
    return f"  first row, {predicted} of {len(row['labels'])} tokens predicted: {''.join(shown)} ..."
