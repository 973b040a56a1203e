"""What becomes of a row on its way into a data set: clean, or dropped for a reason, and in which split."""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from hfkit.data.columns import BadRow, Columns, Kind, ReadRow
from hfkit.data.corpus import Row, stored_message
from hfkit.data.sources.files import read_lines
from hfkit.data.sources.reading import Slice, Source, names_in
from hfkit.privacy.secrets import without_places

CONTEXT = 2  # ASCII characters: no pattern of ftfy has more before, behind or between those that are not
_FAR = re.compile(rf"(?<=[\x00-\x7f]{{{CONTEXT}}})[\x00-\x7f]+(?=[\x00-\x7f]{{{CONTEXT}}})")


class CleanRow(NamedTuple):
    """A row that may be stored.

    Args:
        key: what tells it from others.
        times: how often it is stored.
        characters: of its texts, as `bytes` is.
        values: one for each column, as Parquet holds them.
    """

    split: str
    key: bytes
    times: int
    characters: int
    bytes: int
    values: list[Any]
    origin: str


class CleanSlice(NamedTuple):
    """The rows of a slice in their order; in the place of one that is dropped, why.

    Args:
        left_out: how often a message held something in a field that is not kept, by the field's name.
        size: characters that were read.
    """

    rows: list[CleanRow | BadRow | str]
    left_out: Counter[str]
    size: int


class Cleaning:
    """Cleans slices. It knows of no other slice, so that several processes may each have one.

    Args:
        key_columns: what tells rows apart; all columns where it is None.
        group_column: the column whose rows of one value stay in one split.
        shares: of the rows that go into the test and the validation split.
        repair: whether wrongly decoded text is repaired.
        min_characters: rows with less text are dropped.
    """

    def __init__(
        self,
        sources: list[Source],
        columns: Columns,
        *,
        key_columns: list[str] | None,
        group_column: str | None,
        shares: tuple[float, float],
        repair: bool,
        min_characters: int,
    ):
        self.sources, self.columns = sources, columns
        self.key_columns, self.group_column = key_columns or list(columns.kinds), group_column
        claimed = {source.into for source in sources}  # a split that is claimed by a source takes no rows of others
        self.test_share = 0.0 if "test" in claimed else shares[0]
        self.validation_share = 0.0 if "validation" in claimed else shares[1]
        self.repair, self.min_characters = repair, min_characters

    def __call__(self, piece: Slice) -> CleanSlice:
        source, rows = self.sources[piece.source], piece.rows
        if not isinstance(rows, list):
            rows = list(read_lines(rows, self.columns, names_in(source, self.columns)))
        size = sum(len(text) for row in rows if isinstance(row, ReadRow) for text in _all_texts(row.values))
        left_out = Counter(name for row in rows if isinstance(row, ReadRow) for name in row.left_out)
        return CleanSlice([self._clean(row, source) for row in rows], left_out, size)

    def _clean(self, row: ReadRow | BadRow, source: Source) -> CleanRow | BadRow | str:
        origin = _stored_origin(row.origin)
        if isinstance(row, BadRow):
            return row._replace(origin=origin, reason=printable(row.reason))
        values = {name: _cleaned(value, self.repair) for name, value in row.values.items()}
        if reason := self.reason_to_drop(values):
            return reason
        key = self.key(values)
        split = source.into or self.split_of(values, row.group, key)
        texts = list(_all_texts(values))
        return CleanRow(
            split,
            key,
            _times(source.weight, key) if split == "train" else 1,
            sum(map(len, texts)),
            sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
            [_stored(values[name], kind) for name, kind in self.columns.kinds.items()],
            origin,
        )

    def reason_to_drop(self, values: Row) -> str | None:
        texts = list(_all_texts(values))
        if not all(text.strip() for text in texts):
            return "empty"
        return "too short" if sum(map(len, texts)) < self.min_characters else None

    def key(self, values: Row) -> bytes:
        """Return what tells rows apart: the one text there is, or all that the columns hold."""
        names = self.key_columns
        if len(names) == 1 and isinstance(values[names[0]], str):
            return _digest(values[names[0]])
        return _digest(json.dumps([values[name] for name in names], ensure_ascii=False))

    def split_of(self, values: Row, group: str | None, key: bytes) -> str:
        """Return the split of a row: by its own hash, so that it stays where it is when the data grows, or its
        group's."""
        if self.group_column is not None:
            group = str(values[self.group_column])
        return self.split_of_key(key) if group is None else self.split_of_group(group)

    def split_of_group(self, group: str) -> str:
        return self.split_of_key(_digest(group))

    def split_of_key(self, key: bytes) -> str:
        share = int.from_bytes(key[:8], "big") / 2**64
        if share < self.test_share:
            return "test"
        return "validation" if share < self.test_share + self.validation_share else "train"


def clean(text: str, repair: bool) -> str:
    """Return the text in Unicode NFC, with wrongly decoded text repaired. ASCII has nothing to repair and is passed as
    it is."""
    if text.isascii():
        return text
    if repair and may_be_mojibake(text):
        import ftfy

        # Only the encoding is repaired: quotes, ligatures and widths are the author's.
        text = ftfy.fix_encoding(text)
    return unicodedata.normalize("NFC", text)


def may_be_mojibake(text: str) -> bool:
    """Return whether ftfy finds wrongly decoded text, by a look at what is not ASCII and at `CONTEXT` around it.

    The verdict is that on the whole text, which takes most of the time of a preparation: each of ftfy's patterns needs
    a character that is not ASCII and none has more ASCII beside it than is kept. So nothing that one would match is
    cut, and none matches across the NUL that stands for the rest.
    """
    from ftfy.badness import is_bad

    return is_bad(_FAR.sub("\0", text))


def printable(text: str) -> str:
    """Return a text that can be stored: file names and keys may hold what is not Unicode."""
    return text.encode(errors="backslashreplace").decode()


def _stored_origin(origin: str) -> str:
    """Return `books.jsonl:17` as it may be stored."""
    path, colon, line = origin.rpartition(":")
    return f"{_stored_place(path)}:{line}" if colon and line.isdigit() else _stored_place(origin)


@functools.lru_cache(maxsize=4096)
def _stored_place(path: str) -> str:
    return printable(without_places(path))


def _cleaned(value: object, repair: bool) -> Any:
    """Return a value with every text in it clean."""
    if isinstance(value, str):
        return clean(value, repair)
    if isinstance(value, dict):
        return {name: _cleaned(item, repair) for name, item in value.items()}
    return [_cleaned(item, repair) for item in value] if isinstance(value, list) else value


def _all_texts(values: Row) -> Iterator[str]:
    for value in values.values():
        if isinstance(value, str):
            yield value
        else:
            yield from _texts_of(value)


def _texts_of(value: Iterable[Any]) -> Iterator[str]:
    """Yield the texts of a value that must not be empty; of a message what it says, or else the tools that it
    calls."""
    for item in value:
        if isinstance(item, str):
            yield item
        elif "role" in item:
            yield item["content"] if item["content"].strip() else json.dumps(item.get("tool_calls", ""))[1:-1]


def _stored(value: Any, kind: Kind) -> Any:
    """Return a value as Parquet holds it: what tools take, and what they are called with, has any shape and so is
    JSON."""
    if kind == "tools":
        return json.dumps(value, ensure_ascii=False)
    if kind != "messages":
        return value
    return [stored_message(turn) for turn in value]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _times(weight: float, key: bytes) -> int:
    """Return how often a row is stored: the whole part of the weight, and once more for as large a share of the
    rows."""
    return int(weight) + (int.from_bytes(key[8:], "big") / 2**64 < weight % 1)
