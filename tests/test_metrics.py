"""Metrics: the libraries' values in English, perfect scores for identical text in any script, intervals and tests."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfkit.errors import HfkitError
from hfkit.metrics import scripts
from hfkit.metrics.catalogue import OF_PYTHON, load_metric
from hfkit.metrics.intervals import bootstrap, paired_test
from hfkit.metrics.labels import confusion

TEXTS = {
    "english": "The cat sat on the mat. It was happy, wasn't it?",
    "german": "Größe und Maß: die Straße ist naß. Über allen Gipfeln ist Ruh!",
    "russian": "Кошка сидела на коврике. Ей было хорошо, не так ли?",
    "greek": "Η γάτα κάθισε στο χαλί. Ο Οδυσσέας ήταν χαρούμενος;",
    "turkish": "IŞIK İstanbul'da ışıl ışıl parlıyor. İyi günler Iğdır!",
    "chinese": "猫坐在垫子上。它很高兴，不是吗？",
    "japanese": "猫はマットの上に座った。とても嬉しかったでしょう。",
    "korean": "고양이가 매트 위에 앉았다. 매우 행복했다.",
    "thai": "แมวนั่งอยู่บนเสื่อ มันมีความสุขมาก",
    "arabic": "جلست القطة على السجادة. كانت سعيدة، أليس كذلك؟",
    "persian": "گربه روی فرش می‌نشیند. او خوشحال بود.",
    "hindi": "बिल्ली चटाई पर बैठी थी। वह बहुत खुश थी।",
    "two words": "hello world",
    "two Russian words": "привет мир",
    "two characters": "你好",
}
MAIN = {"rouge": "rouge1", "bleu": "bleu", "sacrebleu": "score", "chrf": "score", "exact_match": "exact_match"}
SENTENCE = "The cat sat on a mat and it was happy, wasn't it? No: 3.5 dogs ran (fast) to U.S. cities running e-mail"
WORDS = SENTENCE.split()


def english(generator: random.Random, most: int = 30) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, most)))


def lines(generator: random.Random) -> str:
    return "\n".join(english(generator, 9) for _ in range(generator.randint(2, 5)))


def noisy(generator: random.Random, text: str) -> str:
    """The text with some words replaced, its lines as they were."""
    parts = re.split(r"([ \n])", text)
    return "".join(part if part.isspace() or generator.random() < 0.7 else generator.choice(WORDS) for part in parts)


def pairs(rows: int = 150, nrefs: int = 3, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Random predictions, some empty, and 1 to `nrefs` references each, from near to far."""
    generator = random.Random(seed)
    references = [[english(generator) for _ in range(generator.randint(1, nrefs))] for _ in range(rows)]
    return ["" if generator.random() < 0.03 else noisy(generator, several[0]) for several in references], references


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("script", TEXTS)
def test_identical_text_scores_perfectly_and_shuffled_text_does_not(script: str, name: str) -> None:
    text = TEXTS[script]
    whole = 100 if name in ("sacrebleu", "chrf") else 1
    scores = load_metric(name).compute(predictions=[text], references=[text])
    assert scores is not None and scores[MAIN[name]] == whole
    if name == "rouge":
        assert scores == dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 1)
    parts = text.split() if " " in text else list(text)
    other = load_metric(name).compute(predictions=[(" " if " " in text else "").join(parts[::-1])], references=[text])
    assert other is not None and other["rougeL" if name == "rouge" else MAIN[name]] < whole


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_that_of_rouge_score(stemmer: bool) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    generator = random.Random(1)
    texts = [(lines(generator), [lines(generator) for _ in range(generator.randint(1, 3))]) for _ in range(60)]
    predictions, references = pairs()
    predictions += [noisy(generator, several[-1]) for _, several in texts] + [text for text, _ in texts]
    references += [several for _, several in texts] * 2
    types = ["rouge1", "rouge2", "rouge4", "rougeL", "rougeLsum"]
    scorer = RougeScorer(types, use_stemmer=stemmer)
    expected = [scorer.score_multi(several, text) for text, several in zip(predictions, references, strict=True)]
    metric = load_metric("rouge")
    options = {"rouge_types": types, "use_stemmer": stemmer, "split_summaries": False}
    found = metric.statistics(predictions, references, **options)
    for ours, theirs in zip(found.row_scores(), expected, strict=True):
        assert ours == pytest.approx({name: score.fmeasure for name, score in theirs.items()}, abs=1e-9)
    means = {name: np.mean([row[name].fmeasure for row in expected]) for name in types}
    assert metric.compute(predictions=predictions, references=references, **options) == pytest.approx(means, abs=1e-9)
    # Texts of lines are split already: that they may be split changes nothing.
    both = [metric.statistics(predictions[150:], references[150:], split_summaries=split) for split in (False, True)]
    assert both[0].scores() == both[1].scores()
    listed = metric.compute(predictions=predictions, references=references, use_aggregator=False, **options)
    assert listed is not None and listed["rouge2"] == [row["rouge2"] for row in found.row_scores()]


def test_rouge_can_be_that_of_rouge_score_in_any_text() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    for text, reference in (("Naïve café İZMİR straße", "naive cafe izmir STRASSE"), ("Ünlü ﬁne K", "nl fine k")):
        expected = RougeScorer(["rouge1"]).score(reference, text)["rouge1"].fmeasure
        assert load_metric("rouge").statistics([text], [reference], tokenize="ascii").scores()["rouge1"] == expected


def test_rouge_lsum_splits_sentences() -> None:
    text, turned = "The cat sat. The dog ran off!", "The dog ran off! The cat sat."
    scores = load_metric("rouge").compute(predictions=[turned], references=[text])
    assert scores is not None and scores["rougeLsum"] == 1 and scores["rougeL"] < 1
    lines = load_metric("rouge").statistics([turned.replace("! ", "!\n")], [text.replace(". ", ".\n")]).scores()
    assert lines == scores
    russian = load_metric("rouge").statistics(["Собака бежит. Кошка спит."], ["Кошка спит. Собака бежит."]).scores()
    chinese = load_metric("rouge").statistics(["狗跑了！猫坐下。"], ["猫坐下。狗跑了！"]).scores()
    assert russian["rougeLsum"] == chinese["rougeLsum"] == 1 and chinese["rougeL"] < 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. J. Smith left at 3.5 p.m. sharp. He ran!", ["Dr. J. Smith left at 3.5 p.m. sharp.", "He ran!"]),
        ('He said "no." Then he left...  Why?', ['He said "no."', "Then he left...", "Why?"]),
        ("他说：“好。”然后走了！真的？", ["他说：“好。”", "然后走了！", "真的？"]),
        ("वह आया। वह गया।", ["वह आया।", "वह गया।"]),
        ("one. two\nthree. four", ["one. two", "three. four"]),
        ("So do I. Я тоже, и ты, т.е. мы. А.С. Пушкин!", ["So do I.", "Я тоже, и ты, т.е. мы.", "А.С. Пушкин!"]),
        ("not split", ["not split"]),
        (" \n ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert scripts.sentences(text) == expected


def test_words_are_those_of_their_script() -> None:
    assert scripts.words("don't stop_it, e-mail 3.5") == ["don", "t", "stop", "it", "e", "mail", "3", "5"]
    assert scripts.words("Größe café") == ["Größe", "café"]
    assert scripts.words("кот, 猫が2024年") == ["кот", "猫", "が", "2024", "年"]
    assert scripts.words("हिन्दी में") == ["हिन्दी", "में"], "marks are no boundaries"
    assert scripts.words("می‌نشیند") == ["می‌نشیند"], "nor are joiners"
    assert scripts.words("ที่นี่") == ["ที่", "นี่"], "a character has its marks"
    assert scripts.words("👨‍👩‍👧 !?") == []


def test_case_folds_as_turkish_has_it_in_turkish_only() -> None:
    assert scripts.fold("IŞIK İLE", turkic=True) == "ışık ile" and scripts.fold("IN", turkic=False) == "in"
    assert scripts.fold("I\u0307") == scripts.fold("İ") == "i"
    assert scripts.fold("ΟΔΟΣ") == scripts.fold("οδός".replace("ό", "ο")) and scripts.fold("STRASSE") == "strasse"
    metric = load_metric("rouge")
    assert metric.statistics(["ISPARTA İÇİN"], ["ısparta için"]).scores()["rouge2"] == 1
    assert metric.statistics(["ilik su"], ["ılık su"]).scores()["rouge1"] == 0.5
    assert metric.statistics(["I SAW İZMİR"], ["i saw it"]).scores()["rouge2"] == 0.5
    matched = load_metric("exact_match").statistics(["IŞIK"], ["ışık"], ignore_case=True).scores()
    assert matched == {"exact_match": 1}


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (["plain English"], "13a"),
        (["«Русский» текст"], "13a"),
        (["고양이가 앉았다"], "13a"),
        (["中文文本"], "zh"),
        (["使用GitHub Actions进行continuous integration"], "zh"),
        (["the word 你好 means hello in Chinese"], "13a"),
        (["แมวนั่งอยู่"], "char"),
        (["👍 …"], "13a"),
    ],
)
def test_bleu_takes_the_tokenizer_of_the_script(references: list[str], name: str) -> None:
    assert scripts.bleu_name(references) == name


def test_japanese_takes_mecab_if_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, name in ((True, "ja-mecab"), (False, "char")):
        monkeypatch.setattr(scripts, "_has_mecab", lambda has=has: has)
        assert scripts.bleu_name(["猫はマットの上に座った"]) == name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lowercase": True, "smooth_method": "floor"},
        {"smooth_method": "add-k", "smooth_value": 2},
        {"tokenize": "intl"},
    ],
)
def test_sacrebleu_is_that_of_sacrebleu(options: dict[str, Any]) -> None:
    import sacrebleu

    predictions, references = pairs()
    padded = [[(several + [None] * 3)[place] for several in references] for place in range(3)]
    expected = sacrebleu.corpus_bleu(predictions, padded, **options)
    metric = load_metric("sacrebleu")
    found = metric.compute(predictions=predictions, references=references, **options)
    assert found is not None and found["score"] == pytest.approx(expected.score, abs=1e-9)
    for name in ("counts", "totals", "precisions", "bp", "sys_len", "ref_len"):
        assert found[name] == pytest.approx(getattr(expected, name), abs=1e-9)
    rows = metric.statistics(predictions, references, **options).row_scores()
    sentence = sacrebleu.sentence_bleu(predictions[0], references[0], use_effective_order=True, **options)
    assert rows[0]["score"] == pytest.approx(sentence.score, abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"word_order": 2, "lowercase": True}, {"eps_smoothing": True, "beta": 3}])
def test_chrf_is_that_of_sacrebleu(options: dict[str, Any]) -> None:
    import sacrebleu

    predictions, references = pairs(60)
    padded = [[(several + [None] * 3)[place] for several in references] for place in range(3)]
    found = load_metric("chrf").compute(predictions=predictions, references=references, **options)
    expected = sacrebleu.CHRF(**options).corpus_score(predictions, padded)
    assert found is not None and found["score"] == pytest.approx(expected.score, abs=1e-9)


def test_bleu_is_that_of_tensor2tensor() -> None:
    import sacrebleu

    predictions, references = pairs(nrefs=1)
    found = load_metric("bleu").compute(predictions=predictions, references=references)
    expected = sacrebleu.corpus_bleu(predictions, [[several[0] for several in references]], smooth_method="none")
    assert found is not None and found["bleu"] == pytest.approx(expected.score / 100, abs=1e-9)
    assert found["precisions"] == pytest.approx([value / 100 for value in expected.precisions])
    # Of several references the shortest one's length counts, and each n-gram as often as any one of them has it.
    found = load_metric("bleu").compute(
        predictions=["the the cat sat here"], references=[["the cat", "the cat sat here now ok"]], max_order=2
    )
    assert found == {
        "bleu": pytest.approx((4 / 5 * 3 / 4) ** 0.5),
        "precisions": [4 / 5, 3 / 4],
        "brevity_penalty": 1,
        "length_ratio": 2.5,
        "translation_length": 5,
        "reference_length": 2,
    }
    smooth = load_metric("bleu").compute(predictions=["a b"], references=["a c d"], smooth=True, max_order=2)
    assert smooth is not None and smooth["bleu"] == pytest.approx((2 / 3 * 1 / 2) ** 0.5 * np.exp(1 - 3 / 2))
    empty = load_metric("bleu").compute(predictions=[""], references=["a"])
    assert empty is not None and empty["bleu"] == 0
    own = load_metric("bleu").compute(predictions=["a-b"], references=["b-a"], tokenizer=lambda text: text.split("-"))
    assert own is not None and own["precisions"] == [1, 0, 0, 0]


def test_a_package_that_is_an_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.tokenizers", None)
    assert load_metric("rouge").compute(predictions=["a cat"], references=["a cat"])["rouge1"] == 1
    for options in ({"tokenize": "ascii"}, {"use_stemmer": True}):
        with pytest.raises(HfkitError, match=r"pip install 'hfkit\[rouge-score\]'"):
            load_metric("rouge").compute(predictions=["a cat"], references=["a cat"], **options)


def test_label_metrics_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    generator = np.random.default_rng(0)
    for labels, size in (([0, 1], 90), ([0, 1, 2, 5], 120), (["art", "sport", "war"], 80)):
        true, found = generator.choice(labels, size).tolist(), generator.choice(labels, size).tolist()
        weight = generator.random(size)
        for each in (None, weight):
            accuracy = load_metric("accuracy").compute(predictions=found, references=true, sample_weight=each)
            assert accuracy == {"accuracy": pytest.approx(accuracy_score(true, found, sample_weight=each))}
            for options in (
                {"average": "micro"},
                {"average": "macro"},
                {"average": "weighted"},
                {"average": None},
                {"average": "macro", "labels": [*labels[1:], labels[-1] * 2]},
                {"average": "micro", "labels": labels[1:]},
                *([{}, {"pos_label": 0}] if labels == [0, 1] else []),
            ):
                ours = load_metric("f1").compute(predictions=found, references=true, sample_weight=each, **options)
                theirs = f1_score(true, found, sample_weight=each, zero_division=0, **options)
                assert ours is not None and ours["f1"] == pytest.approx(theirs), options
        table = confusion(found, true)
        assert table["confusion_matrix"] == confusion_matrix(true, found).tolist() and table["labels"] == labels
        each_f1 = [table["per_label"][label]["f1"] for label in labels]
        assert each_f1 == pytest.approx(f1_score(true, found, average=None))
    count = load_metric("accuracy").compute(predictions=[0, 1, 2], references=[0, 1, 1], normalize=False)
    assert count == {"accuracy": 2}


def test_exact_match_ignores_what_it_is_told() -> None:
    def score(prediction: str, reference: Any, **options: Any) -> float:
        found = load_metric("exact_match").compute(predictions=[prediction], references=[reference], **options)
        assert found is not None
        return found["exact_match"]

    assert score("The cat", "the cat") == 0 and score("The cat", "the cat", ignore_case=True) == 1
    assert score("cat!", ["dog", "cat"]) == 0 and score("cat! «$»", ["dog", "cat "], ignore_punctuation=True) == 1
    assert score("cat 12", "cat 3", ignore_numbers=True) == 1
    assert score("the cat", "a cat", regexes_to_ignore=["the ", "a "]) == 1
    assert score("", "") == 1, "a question may have no answer"


def test_length_and_variety() -> None:
    found = load_metric("length").compute(predictions=["one two", "猫が", ""])
    assert found == {"length_words": 4 / 3, "length_characters": 3}
    found = load_metric("distinct").compute(predictions=["a b a b", "A b c"])
    assert found == pytest.approx({"distinct_1": 3 / 7, "distinct_2": 3 / 5})
    assert load_metric("distinct").compute(predictions=["", "a"]) == {"distinct_1": 1, "distinct_2": 0}
    generator = random.Random(0)
    statistics = load_metric("distinct").statistics([english(generator) for _ in range(200)])
    for name, (low, high) in statistics.intervals(200).items():
        assert low < statistics.scores()[name] < high


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rouge", {"references": ["a", "b", "c"]}, "references: 3 for 2 predictions, must be as many; give each"),
        ("rouge", {"references": "ab"}, "references: must be a list with one entry a row, got 'ab'"),
        ("rouge", {"references": None}, "references: must be a list with one entry a row, got None"),
        ("bleu", {"references": ["a", []]}, "1 of 2 rows have none, the first is row 2; give each row at least one"),
        ("chrf", {"references": [" ", ["", "\n"]]}, "references: 2 of 2 rows have none, the first is row 1"),
        ("exact_match", {"references": [[], "a"]}, "references: 1 of 2 rows have none"),
        ("rouge", {"predictions": [], "references": []}, "predictions: no rows to score; give"),
        ("rouge", {"predictions": None}, "predictions: no rows to score; give"),
        ("rouge", {"predictions": ["a", None]}, "predictions: row 2 must be text, got None"),
        ("rouge", {"references": ["a", ["b", 4]]}, "references: row 2 must be text, got 4"),
        ("rouge", {"references": ["a", 4]}, "references: row 2 must be a text or a list of texts, got 4"),
        ("rouge", {"use_stemer": True}, 'rouge: has no option "use_stemer", did you mean "use_stemmer"?'),
        ("rouge", {"tokenize": "chars"}, 'tokenize: "chars" is not known, did you mean "char"?'),
        ("sacrebleu", {"tokenize": "13b"}, 'tokenize: "13b" is not known, did you mean "13a"?'),
        ("rouge", {"rouge_types": ["rougel"]}, 'rouge_types: "rougel" is not known, did you mean "rougeL"?'),
        ("bleu", {"max_order": 0}, "max_order: must be at least 1, got 0; 4 is usual"),
        ("chrf", {"char_order": 0}, "char_order: must be at least 1, got 0"),
        ("sacrebleu", {"smooth_method": "ex"}, 'smooth_method: "ex" is not known, did you mean "exp"?'),
        ("exact_match", {"regexes_to_ignore": ["("]}, "regexes_to_ignore: '(' is not valid: missing )"),
        ("f1", {"average": "makro"}, 'average: "makro" is not known, did you mean "macro"?'),
        ("f1", {}, "pos_label: 1 is no class of the rows; use 'a' or 'b'"),
        (
            "f1",
            {"predictions": [0, 1]},
            "must both be names, both be numbers or both be lists of names, got 0 and 'a'",
        ),
        ("accuracy", {"predictions": ["a", 1]}, "predictions: row 2 must be a name as the rows before, got 1"),
        ("accuracy", {"predictions": ["a", 1.5]}, "predictions: row 2 must be a class, by name or by number, got 1.5"),
        ("accuracy", {"sample_weight": [1]}, "sample_weight: 1 weights for 2 rows; give each row one"),
    ],
)
def test_mistakes_are_told(name: str, arguments: dict[str, Any], message: str) -> None:
    given = {"predictions": ["a", "b"], "references": ["a", "b"], **arguments}
    with pytest.raises(HfkitError) as caught:
        load_metric(name).compute(**given)
    assert message in str(caught.value)


def test_more_mistakes_are_told() -> None:
    with pytest.raises(HfkitError, match='^metrics: "rogue" is not known, did you mean "rouge"?'):
        load_metric("rogue")
    with pytest.raises(HfkitError, match='"binary" takes two classes, got 3; use macro, micro, weighted or None'):
        load_metric("f1").compute(predictions=[0, 1, 2], references=[0, 1, 2])
    with pytest.raises(HfkitError, match="labels: no row has one of .*; give the classes that the references have"):
        confusion([0, 1], [0, 1], labels=[2])
    for values, options in (
        (np.zeros((0, 1)), {}),
        (np.zeros((1, 1)), {"samples": 0}),
        (np.ones((1, 1)), {"level": 1}),
    ):
        with pytest.raises(HfkitError, match="statistics: must|samples: must|level: must"):
            bootstrap(values, lambda sums: {}, **options)


def test_a_tokenizer_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sacrebleu.tokenizers.tokenizer_ja_mecab

    monkeypatch.setattr(sacrebleu.tokenizers.tokenizer_ja_mecab, "MeCab", None)
    scripts.bleu_tokenizer.cache_clear()
    with pytest.raises(
        HfkitError, match='tokenize: "ja-mecab" cannot be used here: .*; install what it needs or leave'
    ):
        load_metric("sacrebleu").compute(predictions=["猫"], references=["猫"], tokenize="ja-mecab")


def test_rows_can_be_added_one_by_one_and_in_batches() -> None:
    metric = load_metric("rouge")
    metric.add(prediction="a b", reference="a b")
    metric.add_batch(predictions=["c d", "e f"], references=[["x", "c d"], ["e", "g", "h"]])
    assert metric.compute() == load_metric("rouge").compute(
        predictions=["a b", "c d", "e f"], references=["a b", ["x", "c d"], ["e", "g", "h"]]
    )
    with pytest.raises(HfkitError, match="no rows to score"):
        metric.compute()
    assert load_metric("accuracy").compute(predictions=np.array([1, 0]), references=np.array([True, True])) == {
        "accuracy": 0.5
    }


def mean(sums: np.ndarray) -> dict[str, float]:
    return {"mean": sums[1] / sums[0]}


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 300 intervals 95 % hold the mean of what rows are drawn from, give or take 3 standard errors of 1.3 %."""
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        values = np.stack([np.ones(100), generator.exponential(size=100)], axis=1)
        low, high = bootstrap(values, mean, samples=300, seed=seed)["mean"]
        held += low < 1 < high
    assert 0.90 < held / 300 < 0.98


def test_intervals_of_ratios_are_repeatable_and_narrow_with_rows() -> None:
    """Perplexity and bits per byte, of the nats, tokens and bytes of rows."""

    def likelihood(sums: np.ndarray) -> dict[str, float]:
        return {"perplexity": np.exp(sums[0] / sums[1]), "bits_per_byte": sums[0] / np.log(2) / sums[2]}

    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 50, size=1600).astype(float)
    rows = np.stack([generator.normal(3, 0.5, 1600) * tokens, tokens, tokens * 4], axis=1)
    few, many = bootstrap(rows[:100], likelihood), bootstrap(rows, likelihood)
    assert bootstrap(rows, likelihood) == many != bootstrap(rows, likelihood, seed=1)
    for name, value in likelihood(rows.sum(axis=0)).items():
        assert many[name][0] < value < many[name][1]
        assert 2.5 < (few[name][1] - few[name][0]) / (many[name][1] - many[name][0]) < 6  # 4, but for chance
    narrow = bootstrap(rows, likelihood, level=0.5)
    assert many["perplexity"][0] < narrow["perplexity"][0] < narrow["perplexity"][1] < many["perplexity"][1]


def test_a_perfect_score_is_sure() -> None:
    true = ["rare", *["common"] * 30]
    assert load_metric("f1").statistics(true, true, average="macro").intervals() == {"f1": (1, 1)}
    predictions, references = pairs(40)
    first = [several[0] for several in references]
    for name, score in MAIN.items():
        statistics = load_metric(name).statistics(first, references)
        assert len(statistics.values) == 40 == len(statistics.row_scores())
        whole = statistics.scores()[score]
        assert statistics.intervals(100)[score] == (whole, whole) and whole in (1, 100)
        low, high = load_metric(name).statistics(predictions, references).intervals(200)[score]
        assert low < high or name == "exact_match"


def test_identical_systems_do_not_differ() -> None:
    predictions, references = pairs(40)
    for name in MAIN:
        found = load_metric(name).statistics(predictions, references)
        for test in found.against(load_metric(name).statistics(predictions, references), samples=100).values():
            assert test == (0, 0, 0, 1)


def test_a_better_system_is_seen() -> None:
    predictions, references = pairs(100)
    better = [several[0] for several in references]
    for name in ("rouge", "sacrebleu"):
        found = load_metric(name).statistics(better, references)
        worse = load_metric(name).statistics(predictions, references)
        for score, test in found.against(worse, samples=200).items():
            assert test.p_value == pytest.approx(1 / 201) and 0 < test.low < test.difference < test.high
            assert test.difference == pytest.approx(found.scores()[score] - worse.scores()[score])
    with pytest.raises(HfkitError, match="paired test: the two were scored as .*tok:char.* and as .*tok:13a"):
        found.against(load_metric("sacrebleu").statistics(predictions, references, tokenize="char"))
    with pytest.raises(HfkitError, match=r"the systems have statistics of \(3, 2\) and \(2, 2\) rows and columns"):
        paired_test(np.ones((3, 2)), np.ones((2, 2)), mean)


def test_classes_are_compared_over_the_same_labels() -> None:
    true, a, b = [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 2, 2]
    first, second = (load_metric("f1").statistics(each, true, average="macro") for each in (a, b))
    with pytest.raises(HfkitError, match="f1: with the same `labels`"):
        first.against(second)
    options: dict[str, Any] = {"average": "macro", "labels": [0, 1, 2, 3, 4]}
    first, second = (load_metric("f1").statistics(each, true, **options) for each in (a, b))
    test, back = first.against(second)["f1"], second.against(first)["f1"]
    assert test.difference == first.scores()["f1"] - second.scores()["f1"] == -back.difference
    assert test.p_value == back.p_value and test.low == pytest.approx(-back.high)


def test_p_values_are_uniform_where_systems_are_alike() -> None:
    """Of 300, each tenth below 10 %, 20 % and so on, give or take 3 standard errors; so, too, the interval holds 0."""
    generator = np.random.default_rng(0)
    p_values, held = [], 0
    for seed in range(300):
        hard, ones = generator.normal(size=60), np.ones(60)
        a, b = (np.stack([ones, hard + generator.normal(size=60)], axis=1) for _ in range(2))
        test = paired_test(a, b, mean, samples=200, seed=seed)["mean"]
        p_values.append(test.p_value)
        held += test.low < 0 < test.high
    for limit in np.arange(0.1, 1, 0.1):
        assert abs(np.mean(np.array(p_values) <= limit) - limit) < 3 * (limit * (1 - limit) / 300) ** 0.5 + 0.005
    assert 0.89 < held / 300 < 0.98


def test_signatures_tell_how_scores_were_made() -> None:
    import sacrebleu

    version = sacrebleu.__version__
    metric = load_metric("sacrebleu")
    assert metric.signature() == f"sacrebleu|nrefs:var|case:mixed|eff:yes|tok:auto|smooth:exp|version:{version}"
    metric.compute(predictions=["a b", "猫坐下"], references=["a c", "猫坐"], lowercase=True)
    assert metric.signature() == f"sacrebleu|nrefs:1|case:lc|eff:yes|tok:13a+zh|smooth:exp|version:{version}"
    plain = sacrebleu.BLEU()
    plain.corpus_score(["a b"], [["a c"]])
    metric.compute(predictions=["a b"], references=["a c"], use_effective_order=False)
    assert metric.signature() == f"sacrebleu|{plain.get_signature()}"
    chrf = load_metric("chrf").statistics(["a"], [["a", "b"]], word_order=2).signature
    assert chrf == f"chrf|nrefs:2|case:mixed|eff:yes|nc:6|nw:2|space:no|version:{version}"
    rouge = load_metric("rouge").statistics(["a"], ["a"], rouge_types=["rougeL"]).signature
    assert rouge.startswith(
        "rouge|nrefs:1|rouge_types:rougeL|use_stemmer:no|split_summaries:yes|tok:auto|version:hfkit"
    )
    assert "average:macro" in load_metric("f1").signature(average="macro")
    for name in OF_PYTHON:
        assert load_metric(name).name == name and load_metric(name).signature().startswith(f"{name}|")


def test_nothing_is_downloaded_or_written(tmp_path: Path) -> None:
    """With a cache that cannot be made, and without a network; and naming a metric imports nothing heavy."""
    (tmp_path / "file").touch()
    code = """
import sys
from hfkit.metrics.catalogue import OF_PYTHON, load_metric
assert not {"evaluate", "datasets", "numpy", "sacrebleu", "sklearn"} & set(sys.modules)
import socket
def refused(*_): raise AssertionError("network")
socket.socket.connect = refused
for name in OF_PYTHON:
    labels = name in ("accuracy", "f1")
    print(name, load_metric(name).compute(predictions=[0, 1] if labels else ["a b", "c"],
                                          references=[0, 1] if labels else ["a b", "d"]))
"""
    cache = str(tmp_path / "file" / "cache")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": cache, "HOME": cache, "SACREBLEU": cache}
    for name in ("HF_OF_PYTHON_CACHE", "HF_EVALUATE_CACHE", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()] == list(OF_PYTHON)
