"""Whole documents, each learned from its first token to its end."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from hfkit.data.corpus import Row
from hfkit.data.tasks.base import Example, Task, Usual
from hfkit.data.tasks.templates import without_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_WORDS = 12


@dataclasses.dataclass(frozen=True)
class Text(Task):
    name: ClassVar[str] = "text"
    about: ClassVar[str] = "whole documents"
    trained_by: ClassVar[tuple[str, ...]] = ("distill",)
    measured_by: ClassVar[tuple[str, ...]] = ("likelihood",)
    usual: ClassVar[dict[str, Usual]] = {"text": (("text",), ("content",))}
    is_text: ClassVar[bool] = True

    def columns(self) -> dict[str, tuple[str, str]]:
        return {"text": ("data", "text")}

    def encode(self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
        """Return the document between the tokenizer's BOS and EOS, in windows of at most `length` tokens."""
        before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        return list(windows([*before, *ids, tokenizer.eos_token_id], length))

    def as_text(self, row: Row) -> str:
        return row["text"]

    def learned_text(self, row: Row, examples: list[Example], tokenizer: "PreTrainedTokenizerBase") -> str:
        return row["text"]

    def beginning(self, row: Row, tokenizer: "PreTrainedTokenizerBase", room: int) -> list[int]:
        words = " ".join(row["text"].split(" ")[:SAMPLE_WORDS])
        return without_end(tokenizer(words)["input_ids"][:room], tokenizer)


def windows(ids: list[int], length: int) -> Iterator[Example]:
    """Yield a long text as examples of at most `length` tokens. The last token of one is the context that begins the
    next, so that every token after the first is predicted exactly once."""
    for start in range(0, max(len(ids) - 1, 1), length - 1):
        piece = ids[start : start + length]
        yield Example(piece, [True] * len(piece))
