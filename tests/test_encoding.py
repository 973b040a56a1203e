"""Texts to ids in bulk: the fast encoder gives what the tokenizer gives, or is not taken."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hfkit.data import encoding
from hfkit.data.encoding import bulk_encoder
from hfkit.data.rows import packing
from hfkit.recipe.fields import ResolvedInput
from hfkit.stages import tokenizer as stage

fastokens = pytest.importorskip("fastokens")


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> Any:
    return AutoTokenizer.from_pretrained(made / "runs/tokenizer")


def test_any_text_gives_the_same_ids(tokenizer: Any) -> None:
    encode, name = bulk_encoder(tokenizer, ["the red cat"])
    assert name == "fastokens"
    special = st.sampled_from([*tokenizer.all_special_tokens, "the ", " cat", "\r\n", "\u0301", "\u200d"])
    texts = st.lists(st.one_of(st.text(max_size=20), special), max_size=6).map("".join)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(texts=st.lists(texts, max_size=5))
    def compare(texts: list[str]) -> None:
        try:
            expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        except UnicodeEncodeError:
            return
        assert [ids.tolist() for ids in encode(texts)] == expected

    compare()


def test_both_write_the_same_files(
    made: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for name in ("fastokens", "tokenizers"):
        with monkeypatch.context() as patch:
            if name == "tokenizers":
                patch.setitem(__import__("sys").modules, "fastokens", None)  # as if it were not installed
            folders.append(packing.token_rows(str(made / "runs/data"), tokenizer, 32, "documents", tmp_path / name))
        assert f'"encoder": "{name}"' in (folders[-1] / "tokens.json").read_text(encoding="utf-8")
    assert folders[0].name == folders[1].name
    for path in folders[0].iterdir():
        if path.name != "tokens.json":
            assert path.read_bytes() == (folders[1] / path.name).read_bytes()


@pytest.mark.parametrize("fault", ["other ids", "exception"])
def test_an_encoder_that_differs_is_not_taken_and_that_is_told(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    right = encoding._fast

    def wrong(fast: Any) -> encoding.Encode:
        def encode(texts: list[str]) -> list[np.ndarray]:
            if fault == "exception":
                raise RuntimeError("no such normalizer")
            return [ids[1:] if "river" in text else ids for text, ids in zip(texts, right(fast)(texts), strict=True)]

        return encode

    monkeypatch.setattr(encoding, "_fast", wrong)
    ids = tokenizer("a river", add_special_tokens=False)["input_ids"]
    encode, name = bulk_encoder(tokenizer, ["the cat", "a river"])
    assert name == "tokenizers" and encode(["a river"])[0].tolist() == ids
    told = "other tokens for 'a river'" if fault == "other ids" else "cannot read this tokenizer (no such normalizer)"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece", "word", "character"])
def test_every_kind_of_tokenizer_is_encoded_right(made: Path, tmp_path: Path, algorithm: str) -> None:
    recipe = {"stage": "tokenizer", "data": str(made / "runs/data"), "algorithm": algorithm, "vocab_size": 200}
    stage.run(stage.Recipe.model_validate(recipe), {"data": ResolvedInput(str(made / "runs/data"))}, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["the red cat", "", "  unseen\u00e9 words 17", "dog<eos>tree"]
    found = bulk_encoder(tokenizer, texts)[0](texts)
    assert [ids.tolist() for ids in found] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
