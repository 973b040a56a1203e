"""Templates of prompts and completions: `{column}` is a column of the data."""

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hfkit.data.corpus import Row
from hfkit.errors import HfkitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fields_of(template: str) -> list[str]:
    """Return the names in a template.

    Raises:
        HfkitError: if it is not a template.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise HfkitError(f"{template!r}: is not a template: {error}; write {{{{ and }}}} for braces") from None


def fill(template: str, values: Mapping[str, str | list[str]]) -> str:
    """Return the template with its columns; a list of texts gives its first."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        value = values[name] if name is not None else ""
        parts += [literal, value if isinstance(value, str) else value[0]]
    return "".join(parts)


def prompt_ids(
    template: str, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int, is_whole: bool = False
) -> tuple[list[int], bool]:
    """Return the tokens of a filled template, at most `length`, and whether it was cut.

    The longest column loses its end until all fits; the template's own words stay whole. Empty where the template
    alone does not fit.

    Args:
        is_whole: keep the EOS that a tokenizer writes behind a text; what is to be continued does not end with it.
    """
    names = fields_of(template)
    texts = {name: row[name] if isinstance(row[name], str) else row[name][0] for name in names}
    is_cut = False
    while len(ids := ids_of(fill(template, texts), tokenizer, is_whole)) > length:
        longest = max(texts, key=lambda name: len(texts[name]), default=None)
        if longest is None or not texts[longest]:
            return [], True
        is_cut = True
        texts[longest] = _shortened(texts[longest], len(ids) - length, tokenizer)
    return ids, is_cut


def bare_length(template: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return how many tokens a template has without its columns."""
    return len(ids_of(fill(template, dict.fromkeys(fields_of(template), "")), tokenizer))


def ids_of(text: str, tokenizer: "PreTrainedTokenizerBase", is_whole: bool = False) -> list[int]:
    """Return the tokens of a text, by default without the EOS that some tokenizers write behind it."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if not is_whole and ids and ids[-1] == tokenizer.eos_token_id else ids


def without_end(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens of a text that is to be continued: without an EOS at the end, unless it is all there is."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _shortened(text: str, tokens: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text without its last `tokens` tokens."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids[:-tokens]) if tokens < len(ids) else ""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[-tokens][0]] if tokens < len(offsets) else ""
