"""Classifiers made of models of others: encoders, with or without the heads of other tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from hfkit import cli
from hfkit.training.classification import class_loss
from tests.test_chat import texts, tokenizer_of

BERT = BertConfig(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
DISTILBERT = DistilBertConfig(vocab_size=400, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
RECIPE = """\
stage: finetune
model: model
data: rows.jsonl
task: classify
sequence_length: 64
train: {max_steps: 2, per_device_train_batch_size: 2, torch_compile: false, bf16: false, logging_steps: 1}
"""


def world(folder: Path, monkeypatch: pytest.MonkeyPatch, model: Any, labels: str = "ab") -> None:
    monkeypatch.chdir(folder)
    rows = [{"text": f"{text} {n}", "label": labels[n % len(labels)]} for n, text in enumerate(texts(120))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model.save_pretrained("model")
    tokenizer_of("byte_level", None).save_pretrained("model")
    Path("classify.yaml").write_text(RECIPE, encoding="utf-8")


@pytest.mark.parametrize("lora", [[], ["lora={r: 2}"]], ids=["whole", "lora"])
@pytest.mark.parametrize(
    "model, new",
    [(BertForMaskedLM(BERT), ["bert.pooler.dense", "classifier"]),
     (DistilBertForMaskedLM(DISTILBERT), ["classifier", "pre_classifier"])],
    ids=["bert", "distilbert"],
)  # fmt: skip
def test_an_encoder_becomes_a_classifier(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: Any,
    new: list[str],
    lora: list[str],
) -> None:
    """The head is new, which is told, and is saved whole, also with an adapter: it is evaluated as it was trained."""
    world(tmp_path, monkeypatch, model)
    assert cli.main(["run", "classify.yaml", *lora]) == 0
    names = [f"{name}.{kind}" for name in new for kind in ("bias", "weight")]
    assert f"the head of classes is new: {', '.join(names)}" in capsys.readouterr().out
    if lora:
        with safe_open("runs/classify/adapter_model.safetensors", "pt") as file:
            kept = {key.removeprefix("base_model.model.") for key in file.keys() if "lora_" not in key}  # noqa: SIM118
        assert kept == set(names)
    made = json.loads(Path("runs/classify/metrics.json").read_text(encoding="utf-8"))
    Path("evaluate.yaml").write_text("stage: evaluate\nmodel: runs/classify\ndata: rows.jsonl\ntask: classify\n")
    assert cli.main(["run", "evaluate.yaml"]) == 0
    scores = json.loads(Path("runs/evaluate/metrics.json").read_text(encoding="utf-8"))
    assert scores["accuracy"] == made["accuracy"]


def test_weights_of_another_model_are_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world(tmp_path, monkeypatch, BertForMaskedLM(BERT))
    config = json.loads(Path("model/config.json").read_text(encoding="utf-8"))
    Path("model/config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}), encoding="utf-8")
    assert cli.main(["run", "classify.yaml"]) == 2
    assert "weights are missing: bert.encoder.layer.1." in capsys.readouterr().err


def test_one_class_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world(tmp_path, monkeypatch, BertForMaskedLM(BERT), labels="a")
    assert cli.main(["run", "classify.yaml"]) == 2
    assert "label: the train split has one class only, 'a'" in capsys.readouterr().err
    assert not Path("runs/classify").exists()


def test_the_loss_of_a_step_does_not_depend_on_its_batches() -> None:
    """BERT's own loss is the mean of a batch, which a step of several batches must not add up."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT).eval()
    ids, labels = torch.randint(0, 400, (8, 5)), torch.arange(8) % 2
    whole = class_loss(model(input_ids=ids), labels)
    items = torch.tensor(8)
    parts = sum(class_loss(model(input_ids=ids[n : n + 1]), labels[n : n + 1], items) for n in range(8))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, model(input_ids=ids, labels=labels).loss)


def test_a_classifier_opens_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world(tmp_path, monkeypatch, BertForMaskedLM(BERT))
    assert cli.main(["run", "classify.yaml", "train.gradient_accumulation_steps=2"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained("runs/classify")
    assert model.config.id2label == {0: "a", 1: "b"} and isinstance(model, BertForSequenceClassification)
