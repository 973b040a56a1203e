"""Rows that join and leave a batch between steps, and the text of their tokens."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hfkit.data.tokenizer import load_tokenizer
from hfkit.inference.decoding import Batch, Row
from hfkit.inference.sampling import Sampling, choose
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.serving.text import Writer

WORDS = 200


def greedy(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = HfkitForCausalLM(HfkitConfig(vocab_size=WORDS, max_position_embeddings=256, **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def alone(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    options: Any = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def finish(batch: Batch) -> None:
    with torch.no_grad():
        while batch.is_busy:
            batch.step()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_long_prompts_are_read_in_pieces_while_others_write(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    chance = random.Random(0)
    prompts = [[chance.randrange(WORDS) for _ in range(size)] for size in (5, 150, 90, 40, 1)]
    batch = Batch(model, greedy, 4, 256)
    batch.piece = 13
    rows = [Row(prompt, 60, []) for prompt in prompts]
    batch.add(rows[0])
    with torch.no_grad():
        batch.step()
        for row in rows[1:]:
            batch.add(row)
        before = len(rows[0].tokens)
        steps = 0
        while not rows[1].tokens:
            batch.step()
            steps += 1
        assert len(rows[0].tokens) - before == steps > 150 / 13  # it got a token at every step meanwhile
    finish(batch)
    model.set_attn_implementation("sdpa")
    assert [row.tokens for row in rows] == [alone(model, prompt, 60) for prompt in prompts]


def test_prompts_that_begin_alike_are_read_once(model: Any) -> None:
    chance = random.Random(1)
    system = [chance.randrange(WORDS) for _ in range(100)]
    prompts = [[*system, 5, 6], [*system, 7], system, [*system[:50], 1, 2, 3], [9, *system]]
    batch = Batch(model, greedy, 4, 256, prefixes=3)
    read: list[int] = []
    forward = batch._logits

    def count(slots: list[int], pieces: list[list[int]]) -> torch.Tensor:
        read.append(sum(map(len, pieces)))
        return forward(slots, pieces)

    batch._logits = count  # type: ignore[method-assign]
    for prompt, new in zip(prompts, (102, 1, 1, 3, 101), strict=True):
        read.clear()
        row = Row(prompt, 8, [])
        batch.add(row)
        finish(batch)
        assert row.tokens == alone(model, prompt, 8) and read[0] == new
    assert len(batch.prefixes.known) <= 3


def test_rows_leave_at_any_time(model: Any) -> None:
    chance = random.Random(2)
    batch = Batch(model, greedy, 3, 256)
    batch.piece = 16
    rows = [Row([chance.randrange(WORDS) for _ in range(chance.randint(1, 60))], 30, []) for _ in range(20)]
    kept = [row for index, row in enumerate(rows) if index % 3]
    for row in rows:
        batch.add(row)
    gone = [row for row in rows if row not in kept]
    with torch.no_grad():
        while batch.is_busy:
            batch.step()
            if gone and chance.random() < 0.3:
                batch.drop(gone.pop(chance.randrange(len(gone))))
    assert all(row.tokens == alone(model, row.prompt, 30) for row in kept)


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        (Sampling(), (0.5, 0.3, 0.15, 0.05)),
        (Sampling(top_p=0.7), (0.625, 0.375, 0, 0)),
        (Sampling(top_k=3), (0.526, 0.316, 0.158, 0)),
        (Sampling(temperature=0), (1, 0, 0, 0)),
        (Sampling(top_p=1e-9), (1, 0, 0, 0)),
        (Sampling(temperature=0.5), (0.685, 0.247, 0.062, 0.007)),
    ],
)
def test_tokens_are_drawn_by_each_rows_rule(rule: Sampling, shares: tuple[float, ...]) -> None:
    logits = torch.log(torch.tensor([[0.3, 0.5, 0.05, 0.15]])).repeat(2, 1)
    generators = [random.Random(1), random.Random(2)]
    drawn = [choose(logits, [rule, Sampling(0)], generators)[0] for _ in range(8000)]
    counts = Counter(drawn)
    for token, share in zip((1, 0, 3, 2), shares, strict=True):
        assert counts[token] / 8000 == pytest.approx(share, abs=0.02)


def test_no_character_is_cut_and_no_stop_string_shown(made: Path) -> None:
    tokenizer = load_tokenizer(str(made / "runs" / "tokenizer"))
    text = "the cat \u00e9\u4e2d\U0001f600 sees STOP the dog"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    writer = Writer(tokenizer)
    parts = [writer.add(token) for token in ids]
    assert "".join(parts) + writer.end() == text and all("\ufffd" not in part for part in parts)
    for stop in (" sees", "STOP", "s S", "\U0001f600"):
        writer = Writer(tokenizer, ["never", stop])
        shown = ""
        for token in ids:
            shown += writer.add(token)
            assert text.startswith(shown) and stop not in shown
        assert shown + writer.end() == text[: text.index(stop)] and writer.is_stopped
    writer = Writer(tokenizer, ["dogs"])
    shown = "".join(map(writer.add, ids))
    assert shown != text and shown + writer.end() == text  # what might have become a stop string
    writer = Writer(tokenizer)
    emoji = tokenizer("\U0001f600", add_special_tokens=False)["input_ids"]
    assert "".join(map(writer.add, emoji[:-1])) + writer.end() in ("", " ")
