"""Chats: rendered by the tokenizer's template, tokenized whole, their answers found by characters.

An answer is what the template writes for a turn of the assistant: its reasoning, its text and its tool calls, up to
the token that ends the turn. Answers are learned; all other turns, results of tools among them, are context.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfkit.artifacts.manifest import Json
from hfkit.errors import HfkitError, did_you_mean, reason
from hfkit.recipe.fields import Arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Turns = list[Json]
Tools = list[Json] | str | None  # as JSON schemas, or as text that holds them

TEMPLATES = {
    # For tokenizers without tokens for turns: EOS ends an answer.
    "plain": "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize + ':\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content | trim }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}",
    # Tools stand before the first turn; reasoning before the text of an answer, and its calls, as JSON, after it.
    "chatml": "{{ bos_token }}{% if tools %}{{ '<|im_start|>tools\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content | trim + '</think>\\n' }}{% endif %}"
    "{{ message.content | trim }}"
    "{% for call in message.tool_calls or [] %}{{ '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content | trim + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}  # which a template needs
SMALL_TALK: Turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# Names that templates have for what a data set calls reasoning_content.
REASONING = ("reasoning_content", "reasoning", "thinking")
MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


def template_of(name: str) -> str:
    """Return the text of a template: a built-in one by its name, a file, or the text itself.

    Raises:
        HfkitError: if it is none of them.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{" in name:
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        raise HfkitError(
            f"chat_template: {name}: there is no such file, {did_you_mean(name, TEMPLATES)}; name a built-in one "
            f"({', '.join(TEMPLATES)}), a file, or write the template itself"
        )
    return path.read_text(encoding="utf-8")


def set_template(tokenizer: "PreTrainedTokenizerBase", name: str | None) -> None:
    """Give a tokenizer the template of a recipe, if it names one.

    Raises:
        HfkitError: if there is no such template, or the tokenizer lacks a token that it needs.
    """
    if name is None:
        return
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in TOKENS.get(name, ()) if token not in vocabulary]:
        raise HfkitError(
            f"chat_template: {name} needs the tokens {', '.join(missing)}, which the tokenizer does not have; "
            f"use plain, or add them to the tokenizer"
        )
    tokenizer.chat_template = template_of(name)


def problem_with_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return why a tokenizer cannot be used for chats; None if it can."""
    if not tokenizer.is_fast:
        return "chats need a tokenizer that knows where its tokens lie in a text; save it again with a tokenizer.json"
    if tokenizer.chat_template is None:
        return f"the tokenizer has no chat template; set chat_template: {', '.join(TEMPLATES)}, a file, or its text"
    try:
        if not ends_of_answer(tokenizer):
            return (
                "the chat template ends an answer with no special token, so that a model could never stop; set "
                f"another chat_template: {', '.join(TEMPLATES)}, a file, or its text"
            )
    except HfkitError as error:
        return str(error)
    return None


def render(turns: Turns, tokenizer: "PreTrainedTokenizerBase", tools: Tools = None, is_prompt: bool = False) -> str:
    """Return the text of a chat; with `is_prompt` up to where the assistant's next answer begins.

    Raises:
        HfkitError: if the template refuses it.
    """
    try:
        text = tokenizer.apply_chat_template(
            _named(turns, tokenizer), tools=_tools(tools), tokenize=False, add_generation_prompt=is_prompt
        )
    except Exception as error:  # templates raise whatever they like
        raise HfkitError(
            f"messages: the chat template refuses it: {reason(error)}; correct the row, or set another chat_template"
        ) from None
    return str(text)


def _tools(tools: Tools) -> list[Json] | None:
    """Return tools as templates take them; a data set keeps them as JSON text."""
    return (json.loads(tools or "[]") if isinstance(tools, str) else tools) or None


def _named(turns: Turns, tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """Return the turns with their reasoning under the name that the template reads."""
    template = str(tokenizer.chat_template)
    own = next((name for name in REASONING if re.search(rf"\b{name}\b", template)), REASONING[0])
    return [{own if name == REASONING[0] else name: value for name, value in turn.items()} for turn in turns]


def unwritten(turns: Turns, tokenizer: "PreTrainedTokenizerBase", tools: Tools = None) -> str | None:
    """Return why an answer would be learned without its tool calls; None if the template writes them, or there are
    none."""
    bare = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in turns]
    if bare == turns or render(bare, tokenizer, tools) != render(turns, tokenizer, tools):
        return None
    return (
        "messages: the chat template does not write the tool calls, so that answers would be learned without them; "
        "set a chat_template that does, such as chatml, or leave the calls out of the data"
    )


def prompt_text(turns: Turns, tokenizer: "PreTrainedTokenizerBase", tools: Tools = None) -> str:
    """Return the text up to the last answer, which is to be written anew; all of it, where there is no answer."""
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return render(turns[:last], tokenizer, tools, is_prompt=True)


def answer_of(turns: Turns) -> str:
    """Return the last answer: its text, or its tool calls as JSON."""
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        return ""
    text = answers[-1]["content"].strip()
    calls = answers[-1].get("tool_calls")
    return text or (json.dumps(calls, ensure_ascii=False) if calls else "")


def ends_of_answer(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that the template writes after an answer and in no text: generation stops at any of them.

    A template that refuses small talk is taken to end answers with EOS.
    """
    added = set(tokenizer.get_added_vocab().values()) | {*tokenizer.all_special_ids}
    try:
        asked, answered = render(SMALL_TALK[:1], tokenizer, is_prompt=True), render(SMALL_TALK, tokenizer)
    except HfkitError:
        return [tokenizer.eos_token_id]
    after = answered[len(asked) :].partition("b")[2] if answered.startswith(asked) else answered.rpartition("b")[2]
    return [token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in added][:1]


def generation_ids(tokenizer: "PreTrainedTokenizerBase", is_chat: bool) -> Arguments:
    """Return `eos_token_id` and `pad_token_id` of a generation: where a text ends, of a chat also where an answer
    does.

    Every generation of hfkit takes them from here, and every saved model carries them in its `generation_config`.
    """
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if is_chat and tokenizer.chat_template is not None:
        ends.update(ends_of_answer(tokenizer))
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if ends:
        ids["eos_token_id"] = sorted(ends) if len(ends) > 1 else min(ends)
    return ids


def set_generation_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", is_chat: bool) -> None:
    """Let a model's own `generation_config` stop and pad where hfkit does."""
    for name, value in generation_ids(tokenizer, is_chat).items():
        setattr(model.generation_config, name, value)


# ---- tokens


class EncodedChat(NamedTuple):
    """
    Args:
        ids: the tokens up to the end of the last answer.
        learned: of each, whether it is of an answer.
        ends: where each answer ends, in tokens.
    """

    ids: list[int]
    learned: list[bool]
    ends: list[int]


def encode_chat(turns: Turns, tokenizer: "PreTrainedTokenizerBase", tools: Tools = None) -> Iterator[EncodedChat]:
    """Yield the tokens of a chat up to its last answer; nothing where it has none.

    What the assistant says before anybody else is context. Each answer follows the very tokens that its prompt has at
    inference. Where one sequence cannot give that to all of them, each comes by itself: a template may rewrite earlier
    turns, such as one that drops the reasoning of all but the last, and a tokenizer may join the end of a prompt and
    the beginning of an answer.

    Raises:
        HfkitError: if the template refuses the chat, or an answer does not follow its own prompt.
    """
    answers = []
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant" and index:  # what a chat begins with answers nothing
            asked = render(turns[:index], tokenizer, tools, is_prompt=True)
            answered = render(turns[: index + 1], tokenizer, tools)
            if not answered.startswith(asked):
                raise HfkitError(
                    "messages: the chat template does not write an answer after its prompt, so that it cannot be "
                    "learned; set another chat_template"
                )
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
            answers.append(_Answer(turns[: index + 1], prompt, asked, answered))
    if not answers:
        return
    whole = _encode(answers[-1].turns, answers[-1].text, answers, tokenizer, tools)
    if whole is not None:
        yield whole
        return
    for answer in answers:
        yield _encode(answer.turns, answer.text, [answer], tokenizer, tools) or _joined(answer, tokenizer)


class _Answer(NamedTuple):
    turns: Turns  # up to it
    prompt: list[int]
    asked: str  # the rendered prompt
    text: str  # with the answer


def _encode(
    turns: Turns, text: str, answers: list[_Answer], tokenizer: "PreTrainedTokenizerBase", tools: Tools
) -> EncodedChat | None:
    """Return a rendered chat with all of these answers in it; None where one does not follow its own prompt there."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    marked = _marked(turns, tokenizer, tools, ids) if MARKS.search(str(tokenizer.chat_template)) else [True] * len(ids)
    stops, learned, ends = set(ends_of_answer(tokenizer)), [False] * len(ids), []
    for answer in answers:
        first, stop = len(answer.prompt), len(answer.text)
        if not text.startswith(answer.text) or ids[:first] != answer.prompt:
            return None
        last = next((end for end in range(len(ids), first, -1) if offsets[end - 1][0] < stop), first)
        # What follows the end of the turn, such as a line break, is never written.
        last = next((end for end in range(last, first, -1) if ids[end - 1] in stops), last)
        learned[first:last] = marked[first:last]
        ends.append(last)
    return EncodedChat(ids[: ends[-1]], learned[: ends[-1]], ends)


def _joined(answer: _Answer, tokenizer: "PreTrainedTokenizerBase") -> EncodedChat:
    """Return an answer whose first characters the tokenizer would join with the last ones of its prompt: tokenized
    apart."""
    after = answer.text[len(answer.asked) :]
    # After a special token, which is taken away again, no tokenizer puts a space before a text.
    ids = tokenizer(f"{tokenizer.eos_token}{after}", add_special_tokens=False)["input_ids"][1:]
    stops = set(ends_of_answer(tokenizer))
    ids = ids[: next((end for end in range(len(ids), 0, -1) if ids[end - 1] in stops), len(ids))]
    length = len(answer.prompt) + len(ids)
    return EncodedChat([*answer.prompt, *ids], [False] * len(answer.prompt) + [True] * len(ids), [length])


def _marked(turns: Turns, tokenizer: "PreTrainedTokenizerBase", tools: Tools, ids: list[int]) -> list[bool]:
    """Return, of each token, whether it lies between `{% generation %}` and `{% endgeneration %}` of the template."""
    encoded = tokenizer.apply_chat_template(
        _named(turns, tokenizer),
        tools=_tools(tools),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert encoded["input_ids"] == ids, "apply_chat_template tokenizes what it renders"
    return list(map(bool, encoded["assistant_masks"]))
