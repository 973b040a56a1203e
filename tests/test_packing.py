"""Packing: every token after the first of its document is predicted exactly once, and nothing else is."""

import pickle
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hfkit.artifacts import manifest
from hfkit.data import corpus
from hfkit.data.rows import packing
from hfkit.data.rows.packing import IGNORED, PackedRows
from hfkit.errors import HfkitError


@pytest.mark.parametrize("length", [2, 3, 5, 16, 101])
@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_token_after_the_first_is_predicted_once(seed: int, concatenate: bool, length: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 2, length - 1, length, length + 1, rng.randrange(1, 5 * length)]) for _ in range(40)]
    ends = np.cumsum(sizes)
    documents = [np.arange(end - size, end) + 1 for size, end in zip(sizes, ends, strict=True)]  # no id stands twice
    firsts = {int(ids[0]) for ids in documents if len(ids)}

    predicted: list[int] = []
    for row, pieces in packing.pack(iter(documents), length, concatenate, pad_token_id=0):
        assert row.shape == (length,) and sum(pieces) == length and min(pieces) > 0
        for piece in np.split(row, np.cumsum(pieces)[:-1]):
            assert concatenate or len(set(np.searchsorted(ends, piece))) == 1  # the document of each token
            assert all(token == before + 1 or token in firsts for before, token in zip(piece, piece[1:], strict=False))
            predicted += piece[1:].tolist()
    assert 0 not in predicted and len(set(predicted)) == len(predicted)
    expected = [token for ids in documents for token in ids[1:].tolist()]
    assert expected == [token for token in predicted if not (concatenate and token in firsts)]


def tokenizer(words: int = 30, **keys: object) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{number}" for number in range(words))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(special | keys))


def prepared(folder: Path, words: int = 30, **splits: list[str]) -> str:
    rng = random.Random(0)
    default = [" ".join(f"w{rng.randrange(words)}" for _ in range(rng.randrange(50))) + " é" for _ in range(40)]
    for split in corpus.SPLITS:
        table = pyarrow.table({"text": pyarrow.array(splits.get(split, default), "string")})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return str(folder)


def packed(folder: Path, each: PreTrainedTokenizerFast | None = None, **splits: list[str]) -> PackedRows:
    rows = packing.token_rows(prepared(folder, **splits), each or tokenizer(), 16, "documents", folder / "cache")
    return PackedRows(rows, "train")


@pytest.mark.parametrize("mode", ["documents", "concatenate"])
@pytest.mark.parametrize(
    "words, bos, dtype", [(30, "<bos>", "uint16"), (70_000, "<bos>", "uint32"), (30, None, "uint16")]
)
def test_rows_hold_the_text_and_count_it(tmp_path: Path, words: int, bos: str | None, dtype: str, mode: str) -> None:
    place, tokens = prepared(tmp_path, words, test=["w1", "w2 é"]), tokenizer(words, bos_token=bos)
    folder = packing.token_rows(place, tokens, 16, mode, tmp_path / "cache")
    for split in corpus.SPLITS:
        rows, texts, predicted = PackedRows(folder, split), list(corpus.texts(place, split)), []
        for index, row in enumerate(rows):
            pieces = rows.pieces[rows.row_starts[index] : rows.row_starts[index + 1]].tolist()
            positions = torch.tensor([position for piece in pieces for position in range(piece)])
            assert ("position_ids" in row) == (mode == "documents")
            assert torch.equal(row.get("position_ids", positions), positions)
            assert all(tensor.shape == (16,) and tensor.dtype == torch.int64 for tensor in row.values())
            is_predicted = row["labels"] != IGNORED
            assert torch.equal(is_predicted, positions > 0)
            assert torch.equal(row["labels"][is_predicted], row["input_ids"][is_predicted])
            predicted += row["labels"][is_predicted].tolist()
        assert rows.tokens.dtype == dtype and rows.predicted_tokens == len(predicted)
        assert rows.bytes == len("".join(texts).encode())
        expected = [[1] * bool(bos) + tokens(text).input_ids + [2] for text in texts]
        if mode == "documents":
            assert predicted == [token for ids in expected for token in ids[1:]]
        elif bos:
            assert [token for token in predicted if token != 1] == [token for ids in expected for token in ids[1:]]


def test_a_tokenizer_that_truncates_or_pads_cuts_no_document(tmp_path: Path) -> None:
    limited = tokenizer()
    limited("w1 w2 w3 w4", truncation=True, max_length=3, padding="max_length")
    assert np.array_equal(packed(tmp_path).tokens, packed(tmp_path, limited).tokens)


def test_cache_is_reused_only_for_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder_of(
        each: PreTrainedTokenizerFast, length: int = 16, mode: str = "documents", digest: str = "one"
    ) -> Path:
        manifest.write_json(tmp_path / manifest.MANIFEST, {"digest": digest})
        return packing.token_rows(place, each, length, mode, tmp_path / "cache")

    place = prepared(tmp_path)
    first = folder_of(tokenizer())
    others = {folder_of(tokenizer(31)), folder_of(tokenizer(bos_token=None)), folder_of(tokenizer(), length=17)}
    others |= {folder_of(tokenizer(), mode="concatenate"), folder_of(tokenizer(), digest="two")}
    assert len(others) == 5 and first not in others
    monkeypatch.setattr(packing, "pack", None)  # to pack anew would fail
    assert folder_of(tokenizer()) == first


def test_cache_follows_the_content_of_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert len(packed(tmp_path)) > len(packed(tmp_path, train=["w1 " * 20])) == 2


TOO_LITTLE = [
    (
        {"train": ["w1 w2"]},
        "sequence_length=16: the train split of .+ has only 3 tokens to predict, less than one row",
    ),
    ({"train": ["w1 w2"]}, "; prepare more documents or shorten sequence_length"),
    ({"test": []}, "data: the test split of .+ has no text; prepare more documents"),
]


@pytest.mark.parametrize("splits, message", TOO_LITTLE)
def test_too_little_text_leaves_no_folder(tmp_path: Path, splits: dict[str, list[str]], message: str) -> None:
    with pytest.raises(HfkitError, match=message):
        packed(tmp_path, **splits)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_spawned_workers_give_the_same_rows(tmp_path: Path) -> None:
    rows = packed(tmp_path)
    batches = list(DataLoader(rows, batch_size=8, num_workers=1, multiprocessing_context="spawn"))
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack([row[name] for row in rows]))


def test_a_worker_is_sent_the_place_of_the_tokens_and_not_the_tokens(tmp_path: Path) -> None:
    few, many = (packed(tmp_path, tokenizer(words), train=["w1 " * words]) for words in (50, 50_000))
    sizes = [len(pickle.dumps(rows)) - rows.row_starts.nbytes for rows in (few, many)]
    assert sizes[1] < sizes[0] + 1000
