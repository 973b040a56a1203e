"""A completion after a prompt."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from hfkit.data.corpus import Row
from hfkit.data.tasks import templates
from hfkit.data.tasks.base import Example, Problems, Task, Usual
from hfkit.data.tasks.templates import fields_of, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Generate(Task):
    name: ClassVar[str] = "generate"
    about: ClassVar[str] = "a completion after a prompt"
    usual: ClassVar[dict[str, Usual]] = {
        "prompt": (("prompt",), ("question",), ("instruction", "input"), ("instruction",), ("source",)),
        "completion": (("completion",), ("answer",), ("output",), ("response",), ("target",)),
    }

    @property
    def template(self) -> str:
        return self.prompt or "{prompt}"

    def columns(self) -> dict[str, tuple[str, str]]:
        needed = dict.fromkeys(fields_of(self.template), ("prompt", "text"))
        return needed | dict.fromkeys(fields_of(self.completion), ("completion", "text"))

    def column_problems(self) -> Problems:
        if not fields_of(self.completion):
            yield "completion", f"{self.completion!r} names no column; write {{column}} where the answer stands"

    def template_problems(self, tokenizer: "PreTrainedTokenizerBase", window: int, new_tokens: int | None) -> Problems:
        bare, room = templates.bare_length(self.template, tokenizer), window - (new_tokens or 1)
        if bare >= room:
            yield "prompt", f"fills the window: {bare} tokens without its columns, and there is room for {room}"

    def rewriting_problems(self) -> Problems:
        if self.completion != f"{{{''.join(fields_of(self.completion))}}}":
            yield "completion", f"{self.completion!r}: must be one column alone, which the teacher writes anew"

    def encode(self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
        """Return the row as one example. Where it is too long, the longest column of the prompt loses its end; the
        template's own words and the completion stay whole."""
        answer = tokenizer(fill(self.completion, row), add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        ids, is_cut = self.prompt_ids(row, tokenizer, length - len(answer))
        return [Example(ids + answer, [False] * len(ids) + [True] * len(answer), is_cut)] if ids else []

    def prompt_ids(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int, is_whole: bool = False
    ) -> tuple[list[int], bool]:
        return templates.prompt_ids(self.template, row, tokenizer, length, is_whole)

    def references(self, row: Row) -> list[str]:
        several = max((len(value) for value in row.values() if isinstance(value, list)), default=1)
        versions = [{k: v[i % len(v)] if isinstance(v, list) else v for k, v in row.items()} for i in range(several)]
        return list(dict.fromkeys(fill(self.completion, version).strip() for version in versions))

    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        return fill(self.template, row), fill(self.completion, row)

    def as_text(self, row: Row) -> str:
        return fill(self.template, row) + self.references(row)[0]

    def with_answer(self, row: Row, text: str) -> Row:
        return {**row, fields_of(self.completion)[0]: text}
