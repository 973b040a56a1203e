"""The assistant's turns of a chat."""

import dataclasses
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from hfkit.data import chat
from hfkit.data.corpus import Row
from hfkit.data.tasks.base import Example, Problems, Task, Usual
from hfkit.errors import HfkitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_CHECKED = 50  # before a model is loaded


@dataclasses.dataclass(frozen=True)
class Chat(Task):
    name: ClassVar[str] = "chat"
    about: ClassVar[str] = "the assistant's turns"
    usual: ClassVar[dict[str, Usual]] = {"messages": (("messages",), ("conversations",))}
    is_chat: ClassVar[bool] = True
    answer_key: ClassVar[str] = "messages"

    def columns(self) -> dict[str, tuple[str, str]]:
        return {self.messages: ("messages", "messages")}

    def template_problems(self, tokenizer: "PreTrainedTokenizerBase", window: int, new_tokens: int | None) -> Problems:
        if problem := chat.problem_with_template(tokenizer):
            yield "chat_template", problem

    def row_problems(self, rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", where: str) -> Problems:
        """Yield the first chat that the template refuses or writes only in part, of the first rows."""
        if tokenizer.chat_template is None or not tokenizer.is_fast:
            return
        for number, row in enumerate(islice(rows, ROWS_CHECKED), 1):
            turns, tools = row[self.messages], row.get(self.tools)
            try:
                list(chat.encode_chat(turns, tokenizer, tools))
                problem = chat.unwritten(turns, tokenizer, tools)
            except HfkitError as error:
                problem = str(error)
            if problem:
                yield "data", f"row {number} of {where}: {problem}"
                return

    def encode(self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
        """Return a chat as one example, or one for each answer where the template rewrites earlier turns. It is cut at
        its end, after the last assistant turn that fits."""
        examples = []
        for ids, learned, ends in chat.encode_chat(row[self.messages], tokenizer, row.get(self.tools)):
            whole = max((end for end in ends if end <= length), default=0)
            if any(learned[:whole]):
                examples.append(Example(ids[:whole], learned[:whole], whole < len(ids)))
        return examples

    def prompt_ids(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int, is_whole: bool = False
    ) -> tuple[list[int], bool]:
        text = chat.prompt_text(row[self.messages], tokenizer, row.get(self.tools))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return (ids, False) if len(ids) <= length else ([], True)

    def references(self, row: Row) -> list[str]:
        """Return the last of the chat's answers."""
        return [chat.answer_of(row[self.messages])]

    def as_text(self, row: Row) -> str:
        return "\n".join(turn["content"] for turn in row[self.messages])

    def with_answer(self, row: Row, text: str) -> Row:
        turns = row[self.messages]
        last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
        return {**row, self.messages: [*turns[:last], {"role": "assistant", "content": text}]}
