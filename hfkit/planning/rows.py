"""How many rows of tokens a data set will be, and how long they are: counted on a sample of it."""

import math
import statistics
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hfkit.data.corpus import SPLITS, Row
from hfkit.data.rows import packing
from hfkit.data.rows.examples import best_fit
from hfkit.data.tasks import Task
from hfkit.errors import HfkitError
from hfkit.planning.work import Chore, Lengths, Texts, Tokens

BYTES_A_TOKEN = 3.5  # of English or code, where neither text nor tokenizer is there to tell
SAMPLE_BYTES = 400_000
TOKENIZED_A_SECOND = 3e6  # bytes, packed and written
ENCODED_A_SECOND = 1200  # rows of a task, encoded one by one
OF_TOKENIZING, OF_ENCODING = 1.6e8, 6e7  # bytes that are not given back

Rows = dict[str, tuple[int, Lengths]]  # of each split how many, and how long they are


def packed(texts: Texts | None, tokens: Tokens | None, length: int, how: str) -> Rows:
    """Documents in rows of `length` (`hfkit.data.rows.packing`). Empty where the data is not known."""
    if texts is None:
        return {}
    each = bytes_a_token(texts, tokens)
    lengths = Lengths((length,), length - 1, length, how == "documents")
    found = {split: texts.bytes[split] / each + 2 * texts.rows[split] for split in SPLITS}
    return {split: (max(math.ceil(count / (length - 1)), 1), lengths) for split, count in found.items()}


def windows(texts: Texts, tokens: Tokens | None, split: str, limit: int | None, length: int) -> tuple[int, Lengths]:
    """Documents in windows (`hfkit.inference.likelihood`)."""
    rows = min(texts.rows[split], limit or texts.rows[split])
    size = texts.bytes[split] / max(texts.rows[split], 1) / bytes_a_token(texts, tokens) + 2  # tokens of a document
    whole = [each / bytes_a_token(texts, tokens) + 2 for each in map(_bytes_of, texts.sample)] or [size]
    pieces = [min(each, length) if each <= length else length for each in whole]
    windows_each = statistics.fmean(max(math.ceil((each - 1) / (length - 1)), 1) for each in whole)
    windows_each *= size / statistics.fmean(whole)  # this split's documents may be longer than those of the sample
    lengths = Lengths(tuple(sorted(round(each) for each in pieces)), statistics.fmean(pieces) - 1)
    return max(round(rows * max(windows_each, 1)), 1), lengths


def examples(task: Task, texts: Texts | None, tokens: Tokens | None, length: int, is_packed: bool) -> Rows:
    """The examples of a task, packed into rows or by themselves. Empty where the data is not known."""
    if texts is None:
        return {}
    lengths, learned = _encoded(task, texts, tokens, length)
    each = statistics.fmean(lengths)
    if is_packed:
        bins = best_fit(list(lengths) * max(1, 2000 // len(lengths)), length)
        a_row = len(lengths) * max(1, 2000 // len(lengths)) / len(bins)  # examples
        filled = Lengths((round(min(a_row * each, length)),), a_row * learned, length)
        return {split: (max(math.ceil(texts.rows[split] / a_row), 1), filled) for split in SPLITS}
    return {split: (texts.rows[split], Lengths(lengths, learned)) for split in SPLITS}


def answers(task: Task, texts: Texts, tokens: Tokens | None, window: int, new_tokens: int) -> tuple[int, int]:
    """Tokens of a prompt, and of the answer that a model that knows the task writes, on average."""
    if tokens is None or tokens.tokenizer is None or not texts.sample:
        return window // 2, new_tokens
    rows = texts.sample[:100]
    try:
        prompts = [len(task.prompt_ids(row, tokens.tokenizer, window - new_tokens)[0]) for row in rows]
        told = [len(tokens.tokenizer(task.references(row)[0])["input_ids"]) + 1 for row in rows]
    except (HfkitError, KeyError):
        return window // 2, new_tokens
    return round(statistics.fmean(prompts)), round(statistics.fmean(min(each, new_tokens) for each in told))


def tokenizing(texts: Texts | None, tokens: Tokens | None, cache: Path, *asked: Any) -> list[Chore]:
    """What making the rows takes; nothing where they are there, or a recipe before makes them.

    Args:
        cache: the folder that they are kept in.
        asked: the length and the packing of documents, or what else examples of a task depend on.
    """
    key = (tokens.vocab_size if tokens is not None else 0, *asked)
    if texts is None or key in texts.made_of_it:
        return []
    texts.made_of_it.add(key)
    if len(asked) != 2:
        return [Chore("encoding examples", sum(texts.rows.values()) / ENCODED_A_SECOND, OF_ENCODING)]
    if texts.place is not None and tokens is not None and tokens.is_exact:
        folder = packing.folder_of(texts.place, tokens.tokenizer, *asked, cache)
        if (folder / packing.LAST).exists():
            return []
    size = sum(texts.bytes.values())
    return [Chore("tokenizing", size / TOKENIZED_A_SECOND, min(15 * size, OF_TOKENIZING))]


def bytes_a_token(texts: Texts, tokens: Tokens | None) -> float:
    """Of the sample, under this tokenizer."""
    if tokens is None or tokens.tokenizer is None or not texts.sample:
        return BYTES_A_TOKEN
    return _bytes_a_token(tokens.tokenizer, tuple(_texts_of(texts.sample)))


@lru_cache
def _bytes_a_token(tokenizer: Any, texts: tuple[str, ...]) -> float:
    taken, size = [], 0
    for text in texts:
        taken.append(text)
        size += len(text.encode())
        if size >= SAMPLE_BYTES:
            break
    ids = tokenizer(taken, add_special_tokens=False)["input_ids"]
    return size / max(sum(map(len, ids)), 1)


def _encoded(task: Task, texts: Texts, tokens: Tokens | None, length: int) -> tuple[tuple[int, ...], float]:
    """Of examples the lengths, and how many of their tokens are learned on average."""
    if tokens is not None and tokens.tokenizer is not None:
        try:
            found = [each for row in texts.sample[:200] for each in task.encode(row, tokens.tokenizer, length)]
            kept = [each for each in found if each is not None]
        except (HfkitError, KeyError):
            kept = []
        if kept:
            return tuple(len(each.ids) for each in kept), statistics.fmean(sum(each.learned) for each in kept)
    each = min(round(sum(texts.bytes.values()) / max(sum(texts.rows.values()), 1) / BYTES_A_TOKEN), length)
    return (max(each, 2),), max(each, 2) / 4


def _texts_of(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str) and name != "source":
                yield value


def _bytes_of(row: Row) -> int:
    return sum(len(text.encode()) for text in _texts_of([row]))
