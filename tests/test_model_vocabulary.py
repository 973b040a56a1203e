"""A tokenizer with more ids than its model has embeddings: added tokens, and a tokenizer of another model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hfkit.model.loading import load_model
from tests.test_finetune import problems, run

IDS = torch.arange(10, 40)[None]


@pytest.fixture
def grown(there: Path) -> int:
    """The number of ids of a tokenizer to which two tokens were added, in runs/grown beside the model of before."""
    shutil.copytree("runs/pretrain", "runs/grown", ignore=shutil.ignore_patterns("hfkit.json"))
    tokenizer = AutoTokenizer.from_pretrained("runs/grown")
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<turn>"]})
    tokenizer.save_pretrained("runs/grown")
    return len(tokenizer)


@torch.no_grad()
def logits(place: str) -> torch.Tensor:
    return load_model(place).eval()(IDS).logits


def test_added_tokens_get_the_mean_of_the_embeddings(grown: int, capsys: pytest.CaptureFixture[str]) -> None:
    before, model = load_model("runs/pretrain").get_input_embeddings().weight, load_model("runs/grown")
    assert len(before) == grown - 2
    assert f"the model has {grown - 2} embeddings and its tokenizer {grown} ids: 2 added" in capsys.readouterr().out
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.equal(layer.weight[:-2], before)
        torch.testing.assert_close(layer.weight[-2:], before.mean(0).expand(2, -1))
    assert model.config.vocab_size == logits("runs/grown").shape[-1] == grown
    torch.testing.assert_close(logits("runs/grown")[..., :-2], logits("runs/pretrain"))


@pytest.mark.parametrize("keys", [["lora=null"], ["merge=true"]], ids=["whole", "lora"])
def test_a_fine_tuning_learns_with_them_and_the_result_loads(grown: int, keys: list[str]) -> None:
    run("model=runs/grown", *keys)
    places = ["runs/finetune"] + (["runs/finetune/merged"] if keys == ["merge=true"] else [])
    found = [logits(place) for place in places]
    assert {each.shape[-1] for each in found} == {grown}
    torch.testing.assert_close(found[0], found[-1], rtol=1e-4, atol=1e-4)


def test_a_vocabulary_is_never_made_smaller(there: Path) -> None:
    model: Any = load_model("runs/pretrain")
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 24)
    model.save_pretrained("runs/padded")
    AutoTokenizer.from_pretrained("runs/pretrain").save_pretrained("runs/padded")
    assert load_model("runs/padded").config.vocab_size == size + 24


def test_a_tokenizer_of_another_model_is_told(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = load_model("runs/pretrain")
    model.resize_token_embeddings(50)
    model.save_pretrained("runs/other")
    AutoTokenizer.from_pretrained("runs/pretrain").save_pretrained("runs/other")
    told = problems(capsys, "model=runs/other")
    assert "runs/other: its tokenizer has the id 50 (" in told
    assert "and the model 50 embeddings; it is another model's: put back the tokenizer" in told
