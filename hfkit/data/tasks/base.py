"""What every task has. A task is a subclass in a file of its own, registered by name in `hfkit.data.tasks`."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from hfkit.data.corpus import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Problems = Iterator[tuple[str, str]]  # keys of a recipe, and what is wrong with them
Usual = tuple[tuple[str, ...], ...]


class Example(NamedTuple):
    """Token ids and, for each, whether it is learned; `is_cut`: some of the prompt was cut off to fit."""

    ids: list[int]
    learned: list[bool]
    is_cut: bool = False

    @property
    def learned_ids(self) -> list[int]:
        return [token_id for token_id, is_learned in zip(self.ids, self.learned, strict=True) if is_learned]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is asked to do with a row, as the keys of a recipe describe it.

    Attributes:
        name: the word in recipes (`task:`).
        about: what it is, for the help of that key.
        trained_by: the stages that train it.
        measured_by: the kinds of metrics that fit: `texts`, `classes`, `likelihood` (`hfkit.metrics.catalogue`).
        usual: of each key that names columns the names that they usually have, in the order in which they are looked
            for; several together make a template.
        is_text: whether rows are whole documents, without a prompt.
        is_chat: whether an answer ends where the chat template ends a turn.
        tokenizer_use: what `load_tokenizer` checks a tokenizer for.
        answer_key: the key of a recipe that names the answers.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    trained_by: ClassVar[tuple[str, ...]] = ("finetune", "distill")
    measured_by: ClassVar[tuple[str, ...]] = ("texts", "likelihood")
    usual: ClassVar[dict[str, Usual]] = {}
    is_text: ClassVar[bool] = False
    is_chat: ClassVar[bool] = False
    tokenizer_use: ClassVar[Literal["generate", "classify"]] = "generate"
    answer_key: ClassVar[str] = "completion"

    prompt: str | None = None
    completion: str = "{completion}"
    messages: str = "messages"
    tools: str = "tools"
    chat_template: str | None = None
    label: str = "label"

    @property
    def has_classes(self) -> bool:
        return "classes" in self.measured_by

    @property
    def has_answers(self) -> bool:
        """Whether a model writes texts that are held against references."""
        return "texts" in self.measured_by

    def columns(self) -> dict[str, tuple[str, str]]:
        """Return the columns that the task needs: for each the key that names it, and the kind it must be of."""
        raise NotImplementedError

    def column_problems(self) -> Problems:
        """Yield what is wrong with the keys that name columns, whatever the data."""
        return iter(())

    def room_problems(
        self, tokenizer: "PreTrainedTokenizerBase | None", window: int, new_tokens: int | None
    ) -> Problems:
        """Yield where the task leaves no room for a row.

        Args:
            tokenizer: None where it is not there yet; then nothing is measured with it.
            window: tokens that prompt and answer have together.
            new_tokens: `max_new_tokens` of `generation:`, if it is given.
        """
        if self.has_answers and new_tokens is not None and new_tokens >= window:
            rule = f"must leave room for a prompt in the window of {window}, got {new_tokens}"
            yield "generation.max_new_tokens", rule
        elif tokenizer is not None:
            yield from self.template_problems(tokenizer, window, new_tokens)

    def template_problems(self, tokenizer: "PreTrainedTokenizerBase", window: int, new_tokens: int | None) -> Problems:
        """Yield what is wrong with the template of the prompt; arguments as of `room_problems`."""
        return iter(())

    def row_problems(self, rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", where: str) -> Problems:
        """Yield what is wrong with the first rows that are to be trained on.

        Args:
            where: what the rows are, for the message.
        """
        return iter(())

    def rewriting_problems(self) -> Problems:
        """Yield why `with_answer` cannot be had."""
        return iter(())

    def encode(self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
        """Return the tokens of a training row, at most `length`; nothing if even the completion alone does not fit."""
        raise NotImplementedError

    def prompt_ids(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int, is_whole: bool = False
    ) -> tuple[list[int], bool]:
        """Return the tokens of the prompt, at most `length`, and whether it was cut. Empty if it cannot fit.

        A prompt that is to be continued begins with the tokenizer's special tokens, but does not end with its EOS.
        What is read as a whole does: a text to classify, and (`is_whole`) the input of an encoder-decoder.
        """
        raise NotImplementedError

    def references(self, row: Row) -> list[str]:
        """Return what a prediction is held against: each of several right answers, or all classes of the row."""
        raise NotImplementedError

    def prompt_and_answer(self, row: Row) -> tuple[str, str]:
        """Return the texts of the prompt and of the first right answer, as they are learned."""
        raise NotImplementedError

    def as_text(self, row: Row) -> str:
        """Return prompt and answer as one text."""
        raise NotImplementedError

    def with_answer(self, row: Row, text: str) -> Row:
        """Return the row with another answer."""
        raise NotImplementedError

    def learned_text(self, row: Row, examples: list[Example], tokenizer: "PreTrainedTokenizerBase") -> str:
        """Return the text whose likelihood the row's examples give."""
        return "".join(tokenizer.decode(example.learned_ids, skip_special_tokens=True) for example in examples)

    def beginning(self, row: Row, tokenizer: "PreTrainedTokenizerBase", room: int) -> list[int]:
        """Return what a sample continues, as at most `room` tokens."""
        return self.prompt_ids(row, tokenizer, room)[0] or [tokenizer.pad_token_id]
