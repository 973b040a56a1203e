"""Evaluation: scores that can be recomputed from the predictions, intervals, paired tests, and what bad input gets."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from hfkit import cli
from hfkit.data import corpus
from hfkit.evaluation import likelihood
from hfkit.evaluation.generation import generate
from hfkit.model.loading import load_model
from tests.test_finetune import prepared, there  # noqa: F401 fixtures

EVALUATE = """\
stage: evaluate
model: runs/pretrain
data: tasks.yaml
prompt: "{question} ->"
completion: " {answer}"
batch_size: 4
generation: {max_new_tokens: 4}
"""
RECIPE = "recipes/evaluate.yaml"


@pytest.fixture
def recipe(there: Path) -> Path:  # noqa: F811
    (there / RECIPE).write_text(EVALUATE, encoding="utf-8")
    return there


def run(*options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert cli.main(["run", RECIPE, *options]) == 0
    path = Path("runs/evaluate/predictions.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(Path("runs/evaluate/metrics.json").read_text(encoding="utf-8")), list(map(json.loads, lines))


def test_every_row_is_predicted_once_and_the_scores_are_those_of_the_predictions(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, rows = run()
    expected = list(corpus.rows("runs/tasks", "test"))
    assert [row["references"] for row in rows] == [[each["answer"]] for each in expected]
    assert all(row["prompt"] == f"{each['question']} ->" for row, each in zip(rows, expected, strict=True))
    assert found["rows"] == len(rows) and set(rows[0]) == {"prompt", "prediction", "references", "scores"}

    predictions, references = [row["prediction"] for row in rows], [[row["references"][0] for row in rows]]
    assert found["bleu"] == pytest.approx(
        sacrebleu.BLEU(effective_order=True).corpus_score(predictions, references).score
    )
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, references).score)
    for name in ("rouge1", "rougeL", "bleu", "chrf", "exact_match", "perplexity"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert np.mean([row["scores"]["rouge1"] for row in rows]) == pytest.approx(found["rouge1"], abs=1e-5)
    shown = capsys.readouterr().out
    assert "95 %" in shown and "best" in shown and "worst" in shown and "sacrebleu|nrefs:1" in shown


def test_generation_gives_what_each_prompt_alone_would_give(recipe: Path) -> None:
    """Sorting, padding on the left and the cache change nothing under greedy decoding."""
    model, tokenizer = load_model("runs/pretrain").eval(), AutoTokenizer.from_pretrained("runs/pretrain")
    prompts = [tokenizer(row["question"])["input_ids"] for row in corpus.rows("runs/tasks", "validation")]
    found = generate(model, tokenizer, prompts, 5, {"max_new_tokens": 6})
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_perplexity_is_a_sum_over_the_tokens_whatever_the_batch(recipe: Path) -> None:
    found, rows = run("task=text", "data=data.yaml", "metrics=[perplexity, bits_per_byte]")
    assert rows == []
    model, tokenizer = load_model("runs/pretrain").eval(), AutoTokenizer.from_pretrained("runs/pretrain")
    nats = tokens = size = 0.0
    for text in corpus.texts("runs/data", "test"):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, 31):  # windows of 32 that share one token
            piece = torch.tensor([ids[start : start + 32]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            nats += functional.cross_entropy(logits.double(), piece[0, 1:], reduction="sum").item()
        tokens += len(ids) - 1
        size += len(text.encode())
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_windows_predict_every_token_once() -> None:
    for length in (1, 2, 7, 8, 9, 30):
        pieces = list(likelihood.windows(list(range(length)), 8))
        assert [token for piece in pieces for token in piece.ids[1:]] == list(range(1, length))
        assert all(len(piece.ids) <= 8 for piece in pieces)


def test_a_model_against_itself_and_against_a_better_one(recipe: Path) -> None:
    same, _ = run("against=runs/pretrain")
    assert same["rouge1_difference"] == 0 and same["rouge1_p"] == 1 and same["perplexity_p"] == 1
    train = ["train.max_steps=150", "train.learning_rate=5e-3", "train.save_strategy=no", "lora=null"]
    assert cli.main(["run", "recipes/finetune.yaml", *train]) == 0
    better, _ = run("model=runs/finetune", "against=runs/pretrain", "--rebuild")
    assert better["perplexity_difference_high"] < 0 and better["perplexity_p"] < 0.01


def test_classes_are_scored_by_name(recipe: Path) -> None:
    train = ["train.max_steps=80", "train.learning_rate=3e-3", "train.save_strategy=no"]
    assert cli.main(["run", "recipes/classify.yaml", *train]) == 0
    found, rows = run("model=runs/classify", "task=classify", f"prompt={json.dumps('{question}')}", "label=topic")
    assert found["accuracy"] == pytest.approx(np.mean([row["prediction"] == row["references"][0] for row in rows]))
    assert found["accuracy"] > 0.8 and {row["prediction"] for row in rows} <= {"animal", "other"}


@pytest.mark.parametrize("options", [["quantization.load_in_8bit=true"], ["lora.r=2"]])
def test_adapters_and_quantized_models_are_evaluated_too(recipe: Path, options: list[str]) -> None:
    assert cli.main(["run", "recipes/finetune.yaml", *options]) == 0
    found, rows = run("model=runs/finetune", "limit=5")
    assert len(rows) == 5 and found["perplexity"] > 1


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["metrics=[rouge, acuracy]"], ["metrics.1", 'did you mean "accuracy"?']),
        (["metrics=[rouge, f1]"], ["metrics.1", "f1 does not fit `task: generate`; those that do: rouge, bleu"]),
        (
            ["task=text", "data=data.yaml", "metrics=[rouge]"],
            ["rouge does not fit `task: text`; those that do: perplexity"],
        ),
        (["completion='{ansr}'"], ["completion", 'did you mean "answer"?']),
        (["split=valid"], ["split", 'did you mean "validation"?']),
        (["model=runs/nothere"], ["model", "no such folder"]),
        (["against=runs/tasks"], ["against", "is a data set, but against must be a model"]),
        (["generation.max_tokens=3"], ["generation.max_tokens", "unknown key"]),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(
    recipe: Path, capsys: pytest.CaptureFixture[str], options: list[str], messages: list[str]
) -> None:
    assert cli.main(["run", RECIPE, *options]) == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told
    assert not Path("runs/evaluate").exists() and "Traceback" not in told
