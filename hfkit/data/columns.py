"""What a row of data holds: its columns, each of a kind, and what is wrong with a value that is not of it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from hfkit.errors import did_you_mean, shown

Kind = Literal["text", "texts", "label", "messages"]
ROLES = ("system", "user", "assistant", "tool")


class Row(NamedTuple):
    """One row and where it came from: `books.jsonl:17`. Rows of one group must not be parted by a split."""

    values: dict[str, Any]
    origin: str
    group: str | None = None


class BadRow(NamedTuple):
    """A row that cannot be read: where, and what is wrong with it."""

    origin: str
    reason: str


class Columns:
    """The columns of a data set.

    Args:
        kinds: of each column: `text`; `texts`, a list of them; `label`, a class by name or number; `messages`, a chat
            of `{role, content}`.
        labels: the names of the classes, where they are known; a number is a place in this list.
    """

    def __init__(self, kinds: dict[str, Kind], labels: list[str] | None = None):
        self.kinds, self.labels = kinds, labels
        self._label_type: type | None = None
        self._readers: dict[str, Callable[[Any], Any]] = {
            "text": _text,
            "texts": _texts,
            "label": self._label,
            "messages": _messages,
        }

    def row(
        self, found: Mapping[str, Any], names: dict[str, str], origin: str, group: str | None = None
    ) -> Row | BadRow:
        """The row of the values that were found under `names` (of this data set -> of the source)."""
        values = {}
        for column, kind in self.kinds.items():
            name = names[column]
            if name not in found:
                return BadRow(origin, f'column "{name}": is missing, {did_you_mean(name, found)}')
            try:
                values[column] = self._readers[kind](found[name])
            except ValueError as error:
                return BadRow(origin, f'column "{name}": {error}')
        return Row(values, origin, group)

    def _label(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"must be a label, a text or a whole number, got {shown(value)}")
        if self.labels is None:
            self._label_type = self._label_type or type(value)
            if not isinstance(value, self._label_type):
                kind = "text" if self._label_type is str else "a whole number"
                raise ValueError(f"must be {kind} as in the rows before, got {shown(value)}")
            return str(value)
        if value in self.labels:
            return str(value)
        if isinstance(value, str) and not value.isdecimal():
            raise ValueError(f"label {shown(value)} is not among `labels`, {did_you_mean(value, self.labels)}")
        if not 0 <= int(value) < len(self.labels):
            raise ValueError(f"label {value} is out of range: `labels` has {len(self.labels)} names, numbered from 0")
        return self.labels[int(value)]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8; save the file as UTF-8") from None
    return value


def _texts(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        raise ValueError(f"must be a list of texts, got {shown(value)}")
    return [_text(each) for each in values]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a list of messages, got {shown(value)}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message must have role and content, got {shown(message)}")
        if message["role"] not in ROLES:
            raise ValueError(
                f"role {shown(message['role'])} of a message is not known, {did_you_mean(str(message['role']), ROLES)}"
            )
    return [{"role": message["role"], "content": _text(message["content"])} for message in value]
