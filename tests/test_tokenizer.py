"""The tokenizer stage: every algorithm trains, loads with transformers and does what its metrics say."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hfkit.data import corpus
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.recipe.fields import ResolvedInput
from hfkit.stages import tokenizer as stage

ALGORITHMS = ("byte_level_bpe", "bpe", "unigram", "wordpiece", "word", "character")
WORDS = "the sky a red don't house wait. (yes) schön x=1 river stone: user 42"
ANY_TEXT = ["中文，好", "🙂👩‍👩‍👧 e\u0301", "\tif x:\r\n\t\ty  ", " \n\n ", "it 's , is n't .", "\x00\ufeff\u2028"]


def sentences(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS.split(), k=30)) + "\n\n" for _ in range(count)]


def prepared(folder: Path, train: list[str], validation: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    for split, texts in (("train", train), ("validation", validation)):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": pyarrow.array(texts, "string")}), folder / f"{split}.parquet"
        )
    return str(folder)


def run(folder: Path, data: str, **keys: Any) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The tokenizer as everyone loads it, and its metrics."""
    folder.mkdir(exist_ok=True)
    recipe = stage.Recipe.model_validate({"stage": "tokenizer", "data": data, "vocab_size": 320, **keys})
    metrics = stage.run(recipe, {"data": ResolvedInput(data)}, folder)
    return AutoTokenizer.from_pretrained(folder), metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared(tmp_path_factory.mktemp("data"), sentences(0, 200), [*sentences(1, 30), "unseen Ω"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_loads_and_reports_the_truth(tmp_path: Path, data: str, algorithm: str) -> None:
    tokenizer, metrics = run(tmp_path, data, algorithm=algorithm)
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [pad, bos, eos, tokenizer.unk_token_id] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    assert tokenizer("the sky").input_ids == [bos, *tokenizer("the sky", add_special_tokens=False).input_ids]

    texts = list(corpus.texts(data, "validation"))
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    exact = [tokenizer.decode(each) == text for each, text in zip(ids, texts, strict=True)]
    tokens = sum(map(len, ids))
    assert metrics == {
        "vocab_size": len(tokenizer),
        "bytes_per_token": len("".join(texts).encode()) / tokens,
        "exact_round_trip": sum(exact) / len(exact),
        "unknown": sum(each.count(3) for each in ids) / tokens,
    }
    assert exact[-1] == (metrics["unknown"] == 0) == (algorithm == "byte_level_bpe")  # the others do not know Ω
    assert algorithm != "character" or list(map(len, ids)) == list(map(len, texts))
    assert all(exact[:-1]) or algorithm not in ("byte_level_bpe", "word", "character")


@pytest.mark.parametrize("text", ANY_TEXT)
def test_byte_level_bpe_gives_back_any_text(tmp_path: Path, data: str, text: str) -> None:
    tokenizer, _ = run(tmp_path, data)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("add_bos, add_eos", [(True, True), (False, True), (False, False)])
def test_bos_and_eos_as_the_recipe_says(tmp_path: Path, data: str, add_bos: bool, add_eos: bool) -> None:
    tokenizer, _ = run(tmp_path, data, add_bos=add_bos, add_eos=add_eos)
    bare = tokenizer("the sky", add_special_tokens=False).input_ids
    assert tokenizer("the sky").input_ids == [1] * add_bos + bare + [2] * add_eos


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_chat_template_masks_exactly_the_assistants_turns(
    tmp_path: Path, data: str, algorithm: str, space: str
) -> None:
    tokenizer, _ = run(tmp_path, data, algorithm=algorithm)
    contents = ["the red sky", "a stone wait.", "wait.", "the river"]
    roles = ["user", "assistant"] * 2
    chat = [{"role": role, "content": space + content} for role, content in zip(roles, contents, strict=True)]
    encoded = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    assert encoded["input_ids"][0] == 1 and encoded["input_ids"].count(1) == 1
    masked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    shown = tokenizer.decode(masked).replace(" ", "").replace("\n", "")  # not every algorithm keeps spaces
    assert shown.replace("<unk>", "") == "astonewait.<|im_end|>theriver<|im_end|>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<bos><|im_start|>user\n") and prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_vocabulary_is_as_large_as_asked_for(tmp_path: Path, algorithm: str) -> None:
    rng = random.Random(0)
    words = ["".join(chr(0x4E00 + rng.randrange(600)) for _ in range(3)) for _ in range(3000)]
    data = prepared(tmp_path / "data", [" ".join(rng.choices(words, k=50)) for _ in range(300)], ["held out"])
    if algorithm == "unigram":  # it keeps every character, and here are more than 500
        with pytest.raises(HfkitError, match="vocab_size"):
            run(tmp_path / "out", data, algorithm=algorithm, vocab_size=500)
    else:
        tokenizer, metrics = run(tmp_path / "out", data, algorithm=algorithm, vocab_size=500)
        assert len(tokenizer) == metrics["vocab_size"] == 500


def test_sample_bytes_caps_what_is_read(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", ["early words", "early words", "late late"], ["held out"])
    for sample_bytes, is_read in ((22, False), (23, True)):
        tokenizer, _ = run(tmp_path / "out", data, algorithm="word", sample_bytes=sample_bytes)
        assert "early" in tokenizer.get_vocab() and ("late" in tokenizer.get_vocab()) == is_read
    texts = iter(["ää", "b", "c"])
    assert list(stage.limited(texts, 4)) == ["ää"] and list(texts) == ["b", "c"]


def test_mistakes_are_told_before_and_in_the_run(tmp_path: Path) -> None:
    recipe = stage.Recipe.model_validate({"stage": "tokenizer", "data": "data", "vocab_size": 261})
    size, data = stage.check(recipe, {"data": ResolvedInput(str(tmp_path))})
    assert size == ("vocab_size", "must be at least 262 (256 bytes and 6 special tokens), got 261")
    assert data[0] == "data" and data[1].endswith("test.parquet; make it with a recipe of `stage: prepare`")
    with pytest.raises(HfkitError, match="data: the validation split is empty; prepare the data again with more"):
        run(tmp_path, prepared(tmp_path, sentences(0, 9), []))


REFUSED: list[tuple[dict[str, str], str]] = [
    ({}, r": no tokenizer can be loaded: \S.+; a recipe of `stage: tokenizer` makes one"),
    ({"pad_token": "<pad>"}, ": the tokenizer has no EOS token, so that a model could never stop; set eos_token"),
    ({"eos_token": "<eos>"}, ": the pad token is not set; add one of its own, such as <pad>, and save it again"),
    (
        {"eos_token": "</s>", "pad_token": "</s>"},
        ": the pad token is its EOS token too; add one of its own, such as <pad>",
    ),
]


@pytest.mark.parametrize("tokens, message", REFUSED)
def test_load_tokenizer_refuses(tmp_path: Path, tokens: dict[str, str], message: str) -> None:
    if tokens:
        backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(tmp_path)
    with pytest.raises(HfkitError, match=f"^{tmp_path}{message}"):
        load_tokenizer(str(tmp_path))
