"""Rows with any number of classes: from a list in a data file to thresholds, scores and a card that runs."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, BertForSequenceClassification

from hfkit import cli
from hfkit.data import corpus
from hfkit.data.columns import BadRow, Columns
from hfkit.errors import HfkitError
from hfkit.inference.classes import ENOUGH_ROWS, best_thresholds
from hfkit.metrics.catalogue import load_metric
from hfkit.training.classification import class_loss
from tests.test_chat import texts, tokenizer_of
from tests.test_classify import BERT, RECIPE

CLASSES = ("animal", "law", "sport")
LISTS = [[name for bit, name in enumerate(CLASSES) if number >> bit & 1] for number in range(8)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of lists, a small encoder, and one training on them."""
    folder = tmp_path_factory.mktemp("multi_label")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lists = [(LISTS[n % 8], text) for n, text in enumerate(texts(240))]
        rows = [{"text": f"{' '.join(labels)} {text}", "labels": labels} for labels, text in lists]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        BertForMaskedLM(BERT).save_pretrained("model")
        tokenizer_of("byte_level", None).save_pretrained("model")
        Path("classify.yaml").write_text(RECIPE, encoding="utf-8")
        Path("evaluate.yaml").write_text("stage: evaluate\nmodel: runs/classify\ndata: rows.jsonl\ntask: classify\n")
        assert cli.main(["run", "classify.yaml", "accept={f1_samples: '>= 0'}"]) == 0
    return folder


@pytest.fixture
def inside(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def read(path: str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_what_is_saved_and_measured(inside: Path) -> None:
    """A stock class opens it, and an evaluation finds what the training measured, with the thresholds it chose."""
    config = AutoModelForSequenceClassification.from_pretrained("runs/classify").config
    assert config.problem_type == "multi_label_classification" and config.id2label == dict(enumerate(CLASSES))
    assert len(config.thresholds) == 3 and all(0 <= each <= 1 for each in config.thresholds)
    assert cli.main(["run", "evaluate.yaml"]) == 0
    trained, found = read("runs/classify/metrics.json"), read("runs/evaluate/metrics.json")
    for name in ("exact_match", "f1", "f1_macro", "f1_micro", "f1_weighted", "f1_samples"):
        assert found[name] == pytest.approx(trained[name]) and found[f"{name}_low"] == trained[f"{name}_low"]
    assert "accuracy" not in trained and "accuracy" not in found
    (place,) = Path("runs").glob("rows.jsonl*")
    expected = [row["labels"] for row in corpus.rows(str(place), "test")]
    lines = [json.loads(line) for line in Path("runs/evaluate/predictions.jsonl").read_text().splitlines()]
    predicted = [line["prediction"] for line in lines]
    assert [line["references"] for line in lines] == expected
    as_vectors = MultiLabelBinarizer(classes=CLASSES).fit_transform
    for average in ("micro", "macro", "weighted", "samples"):
        value = f1_score(as_vectors(expected), as_vectors(predicted), average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(value)
    assert found["exact_match"] == np.mean(
        [first == second for first, second in zip(predicted, expected, strict=True)]
    )
    assert found["rows_per_label"] == {name: sum(name in each for each in expected) for name in CLASSES}


def test_the_card_gives_the_classes_that_reach_their_thresholds(inside: Path) -> None:
    code = Path("runs/classify/README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    config = read("runs/classify/config.json")
    always = {**config, "thresholds": [0.0, 1.0, 0.0]}
    Path("runs/classify/config.json").write_text(json.dumps(always), encoding="utf-8")
    try:
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    finally:
        Path("runs/classify/config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "'animal'" in told and "'sport'" in told and "'law'" not in told


def test_an_adapter_keeps_its_thresholds_when_it_is_merged(inside: Path) -> None:
    out = ["lora={r: 2}", "merge=true", "output_dir=runs/lora"]
    assert cli.main(["run", "classify.yaml", *out]) == 0
    kept, merged = read("runs/lora/config.json"), read("runs/lora/merged/config.json")
    assert merged["thresholds"] == kept["thresholds"] and merged["problem_type"] == "multi_label_classification"
    assert cli.main(["run", "evaluate.yaml", "model=runs/lora", "output_dir=runs/of_lora"]) == 0
    assert read("runs/of_lora/metrics.json")["f1_micro"] == pytest.approx(read("runs/lora/metrics.json")["f1_micro"])


@pytest.mark.parametrize(
    "change, told",
    [
        (
            "accept={accuracy: '>= 0.5'}",
            "accept.accuracy=>= 0.5: is not measured here, known: exact_match",
        ),
        (
            "train.metric_for_best_model=accuracy",
            "metric_for_best_model=accuracy: is not a score of this training",
        ),
        ("label=text", "label: the validation split has classes that training never sees"),
    ],
)
def test_what_does_not_fit_is_told(inside: Path, capsys: pytest.CaptureFixture[str], change: str, told: str) -> None:
    assert cli.main(["run", "classify.yaml", change, "output_dir=runs/refused"]) == 2
    assert told in capsys.readouterr().err and not Path("runs/refused/config.json").exists()


def test_a_classifier_of_one_class_is_not_for_lists(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = BertForSequenceClassification(deepcopy(BERT))
    model.config.problem_type = "single_label_classification"
    model.save_pretrained("one")
    tokenizer_of("byte_level", None).save_pretrained("one")
    assert cli.main(["run", "evaluate.yaml", "model=one", "output_dir=runs/one"]) == 2
    told = "model=one: one: chooses one class, and row 1 of the test split has a list of them; fine-tune a model"
    assert told in capsys.readouterr().err


def test_the_loss_is_that_of_the_model_itself() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(deepcopy(BERT)).eval()
    model.config.problem_type = "multi_label_classification"
    ids, labels = torch.randint(0, 400, (6, 5)), torch.randint(0, 2, (6, 2)).float()
    whole = class_loss(model(input_ids=ids), labels)
    torch.testing.assert_close(whole, model(input_ids=ids, labels=labels).loss)
    items = torch.tensor(labels.numel())
    parts = sum(class_loss(model(input_ids=ids[n : n + 2]), labels[n : n + 2], items) for n in (0, 2, 4))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, functional.binary_cross_entropy_with_logits(model(input_ids=ids).logits, labels))


def test_no_threshold_is_better_than_the_chosen_one() -> None:
    draw = np.random.default_rng(0)
    true = draw.random((200, 3)) < (0.1, 0.5, 0.01)
    true[:, 2] = False
    true[: ENOUGH_ROWS - 1, 2] = True  # too few for a threshold of its own
    probabilities = np.clip(true * 0.3 + draw.random(true.shape) * 0.6, 0, 1).round(2)
    found = best_thresholds(probabilities, true)
    for column in (0, 1):
        best = max(f1_score(true[:, column], probabilities[:, column] >= each) for each in np.linspace(0, 1, 1001))
        assert f1_score(true[:, column], probabilities[:, column] >= found[column]) == pytest.approx(best)
    together = [f1_score(true.ravel(), (probabilities >= each).ravel()) for each in np.linspace(0, 1, 1001)]
    assert f1_score(true.ravel(), (probabilities >= found[2]).ravel()) == pytest.approx(max(together))
    assert best_thresholds(np.full((4, 2), 0.3), np.zeros((4, 2), dtype=bool)) == [0.5, 0.5]


@pytest.mark.parametrize(
    "value, kept",
    [
        (["b", "a", "b"], ["b", "a"]),
        ([], []),
        ('["a", "b"]', ["a", "b"]),  # as a CSV file holds it
        ("a", ["a"]),
        ("", []),
        ([1.0, 0], ["1", "0"]),
        ("[1, 2", "must be a list of labels, got '[1, 2'"),
        ({"a": 1}, "must be a list of labels, got {'a': 1}"),
        ([["a"]], "must be a label: a text, a whole number, true or false, got ['a']"),
        (["a", 1], "must be text as in the rows before, got 1"),
    ],
)  # fmt: skip
def test_a_list_of_labels_is_read(value: object, kept: object) -> None:
    found = Columns({"labels": "labels"}).row({"labels": value}, {"labels": "labels"}, "x:1")
    if isinstance(kept, str):
        assert isinstance(found, BadRow) and found.reason == f'column "labels": {kept}'
    else:
        assert not isinstance(found, BadRow) and found.values == {"labels": kept}


def test_f1_of_one_class_and_of_lists_are_told_apart() -> None:
    metric = load_metric("f1")
    with pytest.raises(HfkitError, match='"samples" takes a list of classes a row; use macro'):
        metric.statistics(["a"], ["b"], average="samples")
    with pytest.raises(HfkitError, match='"binary" takes one class a row; use macro, micro, samples'):
        metric.statistics([["a"]], [["b"]])
    with pytest.raises(HfkitError, match="must be of their names, got 1"):
        metric.statistics([[1, 0]], [[1, 1]], average="micro")
    assert metric.compute(predictions=[["a"]], references=[["b", "a"]], average="samples") == {
        "f1": pytest.approx(2 / 3)
    }
