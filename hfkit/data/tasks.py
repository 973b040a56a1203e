"""What a model is asked to do with a row: the prompt, the completion and which tokens are learned."""

import string
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from hfkit.data import chat, corpus
from hfkit.errors import HfkitError, did_you_mean
from hfkit.recipe.fields import StageRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHATS_CHECKED = 50  # before a model is loaded


class TaskRecipe(StageRecipe):
    """The keys that describe a task. `prompt` and `completion` are templates: `{column}` is a column of the data."""

    task: Literal["text", "generate", "chat", "classify"] = Field(
        description="generate: a completion after a prompt. chat: the assistant's turns. classify: a label for a text."
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="Template of the prompt, or of the text to classify. By default {prompt} or {text}.",
    )
    completion: str = Field("{completion}", min_length=1, description="Template of what is to be generated.")
    messages: str = Field("messages", description="Column with the chat.")
    tools: str = Field("tools", description="Column with the tools of a chat, as JSON schemas, if the data has it.")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="How a chat becomes text: plain, chatml, a file, or the template. By default the tokenizer's own.",
    )
    label: str = Field("label", description="Column with the class, or with a list of classes (multi-label).")

    @property
    def template(self) -> str:
        return self.prompt or ("{text}" if self.task == "classify" else "{prompt}")

    def columns(self) -> dict[str, tuple[str, str]]:
        """The columns that the task needs: for each the key that names it, and the kind it must be of."""
        if self.task == "text":
            return {"text": ("data", "text")}
        if self.task == "chat":
            return {self.messages: ("messages", "messages")}
        needed = dict.fromkeys(fields_of(self.template), ("prompt", "text"))
        if self.task == "classify":
            return needed | {self.label: ("label", "label")}
        return needed | dict.fromkeys(fields_of(self.completion), ("completion", "text"))


class Example(NamedTuple):
    """Token ids and, for each, whether it is learned; `is_cut`: some of the prompt was cut off to fit."""

    ids: list[int]
    learned: list[bool]
    is_cut: bool = False

    @property
    def learned_ids(self) -> list[int]:
        return [each for each, is_learned in zip(self.ids, self.learned, strict=True) if is_learned]


def fields_of(template: str) -> list[str]:
    """The names in a template.

    Raises:
        HfkitError: if it is not a template.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise HfkitError(f"{template!r}: is not a template: {error}; write {{{{ and }}}} for braces") from None


def fill(template: str, values: dict[str, Any]) -> str:
    """The template with its columns; a list of texts gives its first."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        value = values[name] if name is not None else ""
        parts += [literal, value if isinstance(value, str) else value[0]]
    return "".join(parts)


def check_data(recipe: TaskRecipe, place: str, planned: StageRecipe | None) -> Iterator[tuple[str, str]]:
    """What is wrong with the data of a task, as problems of the recipe's keys.

    Args:
        place: a folder, or an id on the Hub, which is looked at when it is read.
        planned: the recipe that makes the folder, if one does.
    """
    if problem := corpus.problem_with(place):
        yield "data", problem
        return
    columns = getattr(planned, "columns", None) or corpus.columns_of(place)
    if columns is not None:
        yield from _check_columns(recipe, columns)


def _check_columns(recipe: TaskRecipe, columns: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Names that the data does not have or has of another kind. A text and a label are of one kind on disk."""
    try:
        for name, (key, kind) in recipe.columns().items():
            if name not in columns:
                yield key, f"the data has no column {name!r}, {did_you_mean(name, columns)}"
            elif (columns[name] == "messages") != (kind == "messages"):
                is_chat = "is a chat" if columns[name] == "messages" else "is no chat"
                yield key, f"the column {name!r} of the data {is_chat}; name another, or choose another task"
    except HfkitError as error:
        yield "prompt", str(error)
    if recipe.task == "generate" and not fields_of(recipe.completion):
        yield "completion", f"{recipe.completion!r} names no column; write {{column}} where the answer stands"


def check_room(
    recipe: TaskRecipe, tokenizer: "PreTrainedTokenizerBase | None", window: int, new_tokens: int | None
) -> Iterator[tuple[str, str]]:
    """Where a task leaves no room for a row, as problems of the recipe's keys.

    Args:
        tokenizer: None where it is not there yet; then a template is not measured.
        window: tokens that prompt and answer have together.
        new_tokens: `max_new_tokens` of `generation:`, if it is given.
    """
    if recipe.task not in ("text", "classify") and new_tokens is not None and new_tokens >= window:
        yield "generation.max_new_tokens", f"must leave room for a prompt in the window of {window}, got {new_tokens}"
    elif recipe.task == "chat" and tokenizer is not None:
        if problem := chat.problem_with_template(tokenizer):
            yield "chat_template", problem
    elif recipe.task in ("generate", "classify") and tokenizer is not None:
        text = fill(recipe.template, dict.fromkeys(fields_of(recipe.template), ""))
        bare, room = len(_ids(text, tokenizer)), window - (new_tokens or 1 if recipe.task == "generate" else 0)
        if bare >= room:
            yield "prompt", f"fills the window: {bare} tokens without its columns, and there is room for {room}"


def check_chats(
    recipe: TaskRecipe, rows: Iterable[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> Iterator[tuple[str, str]]:
    """The first chat that the template refuses or writes only in part, of the first rows.

    Args:
        where: what the rows are, for the message.
    """
    if tokenizer.chat_template is None or not tokenizer.is_fast:
        return
    for number, row in enumerate(islice(rows, CHATS_CHECKED), 1):
        turns, tools = row[recipe.messages], row.get(recipe.tools)
        try:
            list(chat.encode_chat(turns, tokenizer, tools))
            problem = chat.unwritten(turns, tokenizer, tools)
        except HfkitError as error:
            problem = str(error)
        if problem:
            yield "data", f"row {number} of {where}: {problem}"
            return


def check_answers(recipe: TaskRecipe, rows: list[dict[str, Any]], split: str) -> Iterator[tuple[str, str]]:
    """Rows that give nothing to hold a prediction against, as a problem of the recipe's key."""
    blank = [number for number, row in enumerate(rows, 1) if not any(reference(recipe, row))]
    if blank:
        key = "messages" if recipe.task == "chat" else "completion"
        many = f", as in {len(blank)} of {len(rows)} rows" if len(blank) > 1 else ""
        yield key, f"row {blank[0]} of the {split} split has no answer{many}; leave such rows out of the data"


def reference(recipe: TaskRecipe, row: dict[str, Any]) -> list[str]:
    """What a prediction is held against: each of several completions, or the last of a chat's answers."""
    if recipe.task == "chat":
        return [chat.answer_of(row[recipe.messages])]
    several = max((len(value) for value in row.values() if isinstance(value, list)), default=1)
    versions = [{k: v[i % len(v)] if isinstance(v, list) else v for k, v in row.items()} for i in range(several)]
    return list(dict.fromkeys(fill(recipe.completion, version).strip() for version in versions))


def classes_of(recipe: TaskRecipe, row: dict[str, Any]) -> list[str]:
    """The classes of a row by name: the one that it has, or all of its list."""
    value = row[recipe.label]
    return [str(each) for each in (value if isinstance(value, list) else [value])]


def count_classes(recipe: TaskRecipe, rows: list[dict[str, Any]]) -> int:
    """How many classes some rows have between them."""
    return len({name for row in rows if recipe.label in row for name in classes_of(recipe, row)})


def is_multi_label(recipe: TaskRecipe, place: str, planned: StageRecipe | None) -> bool | None:
    """Whether the rows of a task have lists of classes; None where that is not known before they are read.

    Args:
        place, planned: as in `check_data`.
    """
    if recipe.task != "classify":
        return False
    if planned is None and corpus.problem_with(place):
        return None
    columns = getattr(planned, "columns", None) or corpus.columns_of(place)
    kind = (columns or {}).get(recipe.label)
    return None if kind is None else kind in ("labels", "texts")


# ---- rows to tokens


def encode(
    recipe: TaskRecipe, values: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", length: int
) -> list[Example]:
    """The tokens of a training row, at most `length`; nothing if even the completion alone does not fit.

    A row is one example; a chat whose template rewrites earlier turns is one for each answer.

    The rule of cutting: the longest column of the prompt loses its end until all fits; the template's own words and
    the completion stay whole. A chat is cut at its end, after the last assistant turn that fits.
    """
    if recipe.task == "chat":
        return _encode_chat(recipe, values, tokenizer, length)
    if recipe.task == "classify":
        ids, is_cut = prompt_ids(recipe, values, tokenizer, length)
        return [Example(ids, [True] * len(ids), is_cut)] if ids else []
    answer = [
        *tokenizer(fill(recipe.completion, values), add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    ids, is_cut = prompt_ids(recipe, values, tokenizer, length - len(answer))
    return [Example(ids + answer, [False] * len(ids) + [True] * len(answer), is_cut)] if ids else []


def prompt_ids(
    recipe: TaskRecipe,
    values: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    is_whole: bool = False,
) -> tuple[list[int], bool]:
    """The tokens of the prompt, at most `length`, and whether it was cut. Empty if the bare template does not fit.

    A prompt that is to be gone on with begins with the tokenizer's special tokens, but does not end with its EOS. What
    is read as a whole does: a text to classify, and (`is_whole`) the input of an encoder-decoder.
    """
    if recipe.task == "chat":
        text = chat.prompt_text(values[recipe.messages], tokenizer, values.get(recipe.tools))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return (ids, False) if len(ids) <= length else ([], True)
    names = fields_of(recipe.template)
    texts = {name: values[name] if isinstance(values[name], str) else values[name][0] for name in names}
    is_cut, is_whole = False, is_whole or recipe.task == "classify"
    while len(ids := _ids(fill(recipe.template, texts), tokenizer, is_whole)) > length:
        longest = max(texts, key=lambda name: len(texts[name]), default=None)
        if longest is None or not texts[longest]:
            return [], True
        is_cut = True
        texts[longest] = _shortened(texts[longest], len(ids) - length, tokenizer)
    return ids, is_cut


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase", is_whole: bool = False) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if not is_whole and ids and ids[-1] == tokenizer.eos_token_id else ids


def _shortened(text: str, tokens: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text without its last `tokens` tokens."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids[:-tokens]) if tokens < len(ids) else ""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[-tokens][0]] if tokens < len(offsets) else ""


def _encode_chat(
    recipe: TaskRecipe, values: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", length: int
) -> list[Example]:
    """A chat is one example, or several where the template rewrites earlier turns."""
    found = []
    for ids, learned, ends in chat.encode_chat(values[recipe.messages], tokenizer, values.get(recipe.tools)):
        whole = max((end for end in ends if end <= length), default=0)
        if any(learned[:whole]):
            found.append(Example(ids[:whole], learned[:whole], whole < len(ids)))
    return found
