"""A class, or any number of classes, of a text."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from hfkit.data.corpus import Row
from hfkit.data.tasks import templates
from hfkit.data.tasks.base import Example, Problems, Task, Usual
from hfkit.data.tasks.templates import fields_of, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Classify(Task):
    name: ClassVar[str] = "classify"
    about: ClassVar[str] = "a label for a text"
    trained_by: ClassVar[tuple[str, ...]] = ("finetune",)
    measured_by: ClassVar[tuple[str, ...]] = ("classes",)
    usual: ClassVar[dict[str, Usual]] = {
        "prompt": (("text",), ("sentence",), ("content",)),
        "label": (("label",), ("labels",), ("category",), ("class",)),
    }
    tokenizer_use: ClassVar[Literal["generate", "classify"]] = "classify"
    answer_key: ClassVar[str] = "label"

    @property
    def template(self) -> str:
        return self.prompt or "{text}"

    def columns(self) -> dict[str, tuple[str, str]]:
        return dict.fromkeys(fields_of(self.template), ("prompt", "text")) | {self.label: ("label", "label")}

    def template_problems(self, tokenizer: "PreTrainedTokenizerBase", window: int, new_tokens: int | None) -> Problems:
        bare = templates.bare_length(self.template, tokenizer)
        if bare >= window:
            yield "prompt", f"fills the window: {bare} tokens without its columns, and there is room for {window}"

    def encode(self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
        ids, is_cut = self.prompt_ids(row, tokenizer, length)
        return [Example(ids, [True] * len(ids), is_cut)] if ids else []

    def prompt_ids(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int, is_whole: bool = False
    ) -> tuple[list[int], bool]:
        return templates.prompt_ids(self.template, row, tokenizer, length, is_whole=True)

    def references(self, row: Row) -> list[str]:
        """Return the classes of the row by name: the one that it has, or all of its list."""
        value = row[self.label]
        return [str(name) for name in (value if isinstance(value, list) else [value])]

    def as_text(self, row: Row) -> str:
        return fill(self.template, row)
