"""Vocabularies of teacher and student: whether they are the same, and where two tokenizations of a text meet."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hfkit.distillation.vocabulary import Vocabulary, aligned, compare
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig
from tests.toy import WORDS

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
TEXTS = [
    "the cat sees the red tree",
    "  The cat\n\tfinds   a river ",
    "naïve café, 日本語 and 🙂🙂 in one; the END",
    "x",
    "",
    " ",
]


def wrapped(backend: Tokenizer, **special: str | None) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})


def word_level(words: list[str] = WORDS, **special: str | None) -> PreTrainedTokenizerFast:
    """Words, and white space and marks as tokens of their own."""
    tokens = dict.fromkeys([*SPECIAL, *filter(None, special.values()), *words])
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|\w+|[^\w\s]"), "isolated")
    return wrapped(backend, **special)


def byte_level(vocab_size: int = 300, trim: bool = False, **special: str | None) -> PreTrainedTokenizerFast:
    """With `trim`, offsets leave white space out, so that a token of white space is nowhere."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(WORDS), *TEXTS], trainer)
    return wrapped(backend, **special)


def word_piece() -> PreTrainedTokenizerFast:
    """Lower case without accents; white space is dropped; every text stands between BOS and EOS."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator([*WORDS, *TEXTS], trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    ids = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    return wrapped(backend)


TOKENIZERS = {
    "words": word_level(),
    "bytes": byte_level(),
    "pieces": word_piece(),
    "trimmed": byte_level(340, trim=True),
}
each_pair = pytest.mark.parametrize("names", [(a, b) for a in TOKENIZERS for b in TOKENIZERS], ids="-".join)


# ---- the same vocabulary


def teacher_of(folder: Path, tokenizer: PreTrainedTokenizerFast, logits: int) -> str:
    """The files of a teacher that are read: no weights."""
    tokenizer.save_pretrained(folder / "teacher")
    HfkitConfig(vocab_size=logits, hidden_size=16, num_attention_heads=2).save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def student_of(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    tokenizer.save_pretrained(folder / "student")
    return str(folder / "student")


def refusal(folder: Path, teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast, logits: int) -> str:
    with pytest.raises(HfkitError) as caught:
        compare(teacher_of(folder, teacher, logits), student_of(folder, student))
    return str(caught.value)


@pytest.mark.parametrize("logits", [17, 128])
def test_the_same_map_shares_the_logits_of_its_tokens(tmp_path: Path, logits: int) -> None:
    teacher, student = teacher_of(tmp_path, word_level(), logits), student_of(tmp_path, word_level())
    assert compare(teacher, student) == Vocabulary(width=17, teacher_width=logits)


def test_another_map_of_the_same_size_is_refused_with_what_differs(tmp_path: Path) -> None:
    turned = WORDS[:1] + WORDS[1:][::-1]
    message = refusal(tmp_path, word_level(), word_level(turned), 128)
    assert f'id 5 is "{WORDS[1]}" for the teacher and "{WORDS[-1]}" for the student' in message
    assert "9 more ids differ" in message and message.count("(17 tokens)") == 2
    assert "cross_tokenizer: uld" in message and "id 4 is" not in message


def test_one_token_more_is_refused_on_either_side(tmp_path: Path) -> None:
    message = refusal(tmp_path, word_level(), word_level([*WORDS, "sky"]), 128)
    assert 'id 17 is "sky" for the student and nothing for the other' in message
    assert "(17 tokens)" in message and "(18 tokens)" in message and "more ids differ" not in message
    message = refusal(tmp_path, word_level([*WORDS, "sky"]), word_level(), 128)
    assert 'id 17 is "sky" for the teacher and nothing for the other' in message


@pytest.mark.parametrize("name", ["bos", "eos", "unk"])
def test_other_special_tokens_are_named(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, word_level(), word_level(**{f"{name}_token": "the"}), 128)
    assert f"its {name}_token is <{name}> (id {SPECIAL.index(f'<{name}>')}) and the student's is the (id 4)" in message
    assert "cross_tokenizer: uld" in message and "more ids" not in message and message.count("_token is") == 1
    if name != "eos":
        message = refusal(tmp_path, word_level(**{f"{name}_token": None}), word_level(), 128)
        assert f"its {name}_token is not set" in message


def test_a_pad_token_of_the_students_own_is_no_difference(tmp_path: Path) -> None:
    padless = word_level(pad_token=None)
    teacher = teacher_of(tmp_path, padless, 17)
    assert compare(teacher, student_of(tmp_path, word_level())).width == 17
    student = word_level(pad_token=None)
    student.add_special_tokens({"pad_token": "[PAD]"})
    assert student.pad_token_id == 17
    assert compare(teacher, student_of(tmp_path, student)).width == 17


def test_ids_that_no_token_has_count_too(tmp_path: Path) -> None:
    def gapped() -> PreTrainedTokenizerFast:
        ids = {**{token: i for i, token in enumerate(SPECIAL)}, "the": 9}
        return wrapped(Tokenizer(models.WordLevel(ids, unk_token="<unk>")))

    assert compare(teacher_of(tmp_path, gapped(), 16), student_of(tmp_path, gapped())).width == 10


def test_fewer_logits_than_tokens_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, word_level(), word_level(), 16)
    assert "its tokenizer has the id 16 (" in message and "and the model 16 embeddings" in message


# ---- alignment


def reading(text: str, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[tuple[int, int, int]]:
    """Of each id how far those before it have read, where it starts, and how far it reads; of BOS nothing."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(ids) == len(offsets) + 2
    found, read = [], 0
    for start, end in offsets:
        found.append((read, start if end > start else read, end))
        read = max(read, end)
    return [(-1, -1, -1), *found, (len(text), len(text), len(text) + 1)]


def begins_a_character(read: int, start: int, end: int) -> bool:
    return read <= start and read < end


def check_alignment(text: str, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    """What holds of all pairs, from the offsets and the text alone."""
    student_ids, teacher_ids, pairs = aligned(text, student, teacher)
    tokens, teacher_tokens = reading(text, student, student_ids), reading(text, teacher, teacher_ids)
    assert pairs.shape[1] == 2 and pairs.dtype == np.int64
    assert (np.diff(pairs, axis=0) > 0).all()
    assert pairs[-1].tolist() == [len(student_ids) - 2, len(teacher_ids) - 2], "the last position predicts EOS"
    paired = [(tokens[i + 1], teacher_tokens[j + 1]) for i, j in pairs.tolist()]
    for token, other in paired:
        assert begins_a_character(*token) and begins_a_character(*other)
        assert max(token[0], other[0]) <= min(token[1], other[1]), "both have read what stands before"
    places, teacher_places = (
        {token[1] for token in side if begins_a_character(*token)} for side in (tokens, teacher_tokens)
    )
    found = {token[1] for token, other in paired if token[1] == other[1]}
    assert places & teacher_places == found, "a place that both predict from is missing"


@each_pair
@pytest.mark.parametrize("text", TEXTS)
def test_pairs_begin_at_the_same_character(names: tuple[str, str], text: str) -> None:
    check_alignment(text, TOKENIZERS[names[0]], TOKENIZERS[names[1]])


@each_pair
def test_pairs_of_random_texts(names: tuple[str, str]) -> None:
    source = random.Random(" ".join(names))
    alphabet = [*"abcXYZ .,;-\n\t  ", "é", "ß", "日", "本", "🙂", "e\u0301", "\u00a0", "ﬁ", *WORDS]
    for _ in range(60):
        check_alignment("".join(source.choices(alphabet, k=source.randint(0, 30))), *map(TOKENIZERS.get, names))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_tokenizer_meets_itself_at_every_character(name: str) -> None:
    tokenizer, text = TOKENIZERS[name], "the cat sees the red tree"
    ids, same_ids, pairs = aligned(text, tokenizer, tokenizer)
    assert ids == same_ids and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert pairs.tolist() == [[i, i] for i in range(len(ids) - 1)]


def test_words_and_bytes_meet_where_words_begin() -> None:
    words, letters = word_level(["ab", " ", "é", "cd"]), byte_level(260)
    student_ids, teacher_ids, pairs = aligned("ab écd", words, letters)
    # <bos> ab _ <unk> <eos>, for écd is one word; <bos> a b _ e' e'' c d <eos>, for é is two bytes
    assert len(student_ids) == 5 and len(teacher_ids) == 9
    assert pairs.tolist() == [[0, 0], [1, 2], [2, 3], [3, 7]]
    assert aligned("éé", letters, letters)[2].tolist() == [[0, 0], [2, 2], [4, 4]]


def test_a_token_that_ends_a_character_and_goes_on_is_in_no_pair() -> None:
    ids = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**ids, "©l": 256, "<eos>": 257}, [("©", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    joined = wrapped(backend, bos_token=None, pad_token=None, unk_token=None)
    ids, _, pairs = aligned("aél", joined, byte_level(260))
    assert joined.convert_ids_to_tokens(ids) == ["a", "Ã", "©l", "<eos>"]
    assert pairs.tolist() == [[0, 1], [2, 4]]  # before é, and at the end; not within é, and l begins for one alone
    backend = Tokenizer(models.WordLevel({"aé": 0, "l": 1, "<eos>": 2}))
    backend.pre_tokenizer = pre_tokenizers.Split("l", "isolated")
    halves = wrapped(backend, bos_token=None, pad_token=None, unk_token=None)
    assert aligned("aél", joined, halves)[2].tolist() == [[2, 1]]


def test_dropped_white_space_goes_with_the_next_word_unless_it_is_a_token_of_its_own() -> None:
    pieces, words = TOKENIZERS["pieces"], TOKENIZERS["words"]
    assert len(aligned("the cat ", pieces, pieces)[0]) == 4
    assert aligned("the cat ", pieces, words)[2].tolist() == [[0, 0], [1, 2], [2, 4]]
    joined = Tokenizer(models.WordLevel({"the": 0, " cat": 1, " ": 2, "<eos>": 3}, unk_token=None))
    joined.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+"), "isolated")
    bpe = wrapped(joined, bos_token=None, pad_token=None, unk_token=None)
    assert aligned("the cat", pieces, bpe)[2].tolist() == [[1, 0], [2, 1]], "the second predicts from behind `the`"


def test_offsets_without_white_space_are_read_all_the_same() -> None:
    trimmed, words = TOKENIZERS["trimmed"], TOKENIZERS["words"]
    ids, _, pairs = aligned("a   b", trimmed, words)
    assert [trimmed.convert_ids_to_tokens(i) for i in ids[1:-1]] == ["a", "ĠĠ", "Ġ", "b"]
    assert pairs.tolist() == [[0, 0], [1, 1], [3, 2], [4, 3]]


def test_without_bos_the_first_token_is_not_predicted() -> None:
    without = word_level(bos_token=None)
    student_ids, teacher_ids, pairs = aligned("the cat", without, word_level())
    assert len(student_ids) == 4 and len(teacher_ids) == 5
    assert pairs.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert aligned("", without, word_level())[2].tolist() == []


def test_a_completion_alone_is_paired_behind_its_prompt() -> None:
    pieces, words = TOKENIZERS["pieces"], TOKENIZERS["words"]
    student_ids, teacher_ids, pairs = aligned("cat", pieces, words, prompt="the red")
    assert student_ids[0] == pieces.bos_token_id and student_ids.count(pieces.eos_token_id) == 1
    assert len(student_ids) == 5 and len(teacher_ids) == 5  # <bos> the red cat <eos>; the _ red cat <eos>
    assert pairs.tolist() == [[2, 2], [3, 3]]
