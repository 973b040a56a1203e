"""What a row of data holds: its columns, each of a kind, and what is wrong with a value that is not of it."""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from hfkit.artifacts.manifest import Json
from hfkit.errors import did_you_mean, shown

Kind = Literal["text", "texts", "label", "labels", "messages", "tools"]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant"}
# What a message may hold beside role and content.
FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
ALIASES = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}


class ReadRow(NamedTuple):
    """One row and where it came from: `books.jsonl:17`. Rows of one group must not be parted by a split.

    `left_out` names the fields of messages that held something and are not kept, each as often as it did.
    """

    values: dict[str, Any]
    origin: str
    group: str | None = None
    left_out: tuple[str, ...] = ()


class BadRow(NamedTuple):
    """A row that cannot be read: where it begins, what is wrong with it, and how many lines it took."""

    origin: str
    reason: str
    lines: int = 1


class Columns:
    """The columns of a data set.

    Args:
        kinds: of each column: `text`; `texts`, a list of them; `label`, a class by name or number; `labels`, a list
            of any number of them; `messages`, a chat of `{role, content}`, with `FIELDS` where a message has them;
            `tools`, what a chat may call.
        labels: the names of the classes, where they are known; a number is a place in this list.
    """

    def __init__(self, kinds: dict[str, Kind], labels: list[str] | None = None):
        self.kinds, self.labels = kinds, labels
        self._left_out: list[str] = []
        self._label_types: dict[str, type] = {}
        self._readers: dict[str, Callable[[Any], Any]] = {
            "text": _text,
            "texts": _texts,
            "messages": self._messages,
            "tools": _tools,
        }

    def row(
        self, raw: Mapping[str, Any], names: dict[str, str], origin: str, group: str | None = None
    ) -> ReadRow | BadRow:
        """Return the row of the values that were found under `names` (of this data set -> of the source)."""
        values: dict[str, Any] = {}
        self._left_out = []
        for column, kind in self.kinds.items():
            name = names[column]
            if name not in raw:
                return BadRow(origin, f'column "{name}": is missing, {did_you_mean(name, raw)}')
            try:
                value = raw[name]
                values[column] = self._read(value, kind, column)
                _check_encodable(values[column])
            except ValueError as error:
                return BadRow(origin, f'column "{name}": {error}')
        return ReadRow(values, origin, group, tuple(self._left_out))

    @property
    def is_settled(self) -> bool:
        """Whether the rows that were read have decided all that they decide for later ones: the types of labels."""
        return self.labels is not None or all(
            kind not in ("label", "labels") or column in self._label_types for column, kind in self.kinds.items()
        )

    def _read(self, value: object, kind: Kind, column: str) -> Any:
        if kind == "label":
            return self._label(value, column)
        if kind == "labels":
            return list(dict.fromkeys(self._label(label, column) for label in _list_of_labels(value)))
        return self._readers[kind](value)

    def _messages(self, value: object) -> list[Json]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"must be a list of messages, got {shown(value)}")
        return [self._message(message) for message in value]

    def _message(self, message: object) -> Json:
        if isinstance(message, dict) and {"from", "value"} <= message.keys():  # as ShareGPT writes them
            other_fields = {name: value for name, value in message.items() if name not in ("from", "value")}
            message = {
                "role": SHAREGPT.get(message["from"], message["from"]),
                "content": message["value"],
                **other_fields,
            }
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
            raise ValueError(f"a message must have role and content, got {shown(message)}")
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"role {shown(role)} of a message is not known, {did_you_mean(str(role), ROLES)}")
        fields = {"role": role, "content": _content(message.get("content"))}
        for name, value in message.items():
            field = ALIASES.get(name, name)
            if field in FIELDS and value:
                fields[field] = value
            elif field not in ("role", "content", *FIELDS) and value:
                self._left_out.append(name)
        return fields

    def _label(self, value: object, column: str) -> str:
        """Return the name of a class. Whole numbers may be written as pandas does, 1.0, and yes or no as true and
        false."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, str | bool | int):
            raise ValueError(f"must be a label: a text, a whole number, true or false, got {shown(value)}")
        if self.labels is None:
            expected = self._label_types.setdefault(column, type(value))
            if type(value) is not expected:
                kind = {str: "text", bool: "true or false"}.get(expected, "a whole number")
                raise ValueError(f"must be {kind} as in the rows before, got {shown(value)}")
            return str(value).lower() if isinstance(value, bool) else str(value)
        value = int(value) if isinstance(value, bool) else value
        if value in self.labels:
            return str(value)
        if isinstance(value, str) and not value.isdecimal():
            raise ValueError(f"label {shown(value)} is not among `labels`, {did_you_mean(value, self.labels)}")
        if not 0 <= int(value) < len(self.labels):
            raise ValueError(f"label {value} is out of range: `labels` has {len(self.labels)} names, numbered from 0")
        return self.labels[int(value)]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {shown(value)}")
    return value


def _texts(value: object) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        raise ValueError(f"must be a list of texts, got {shown(value)}")
    return [_text(text) for text in values]


def _list_of_labels(value: object) -> list[Any]:
    """Return a list of classes, which may be empty; the same as JSON text, which is how a CSV file holds it; or one
    class."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return [value] if text else []
        with contextlib.suppress(ValueError):
            value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError(f"must be a list of labels, got {shown(value)}")
    return value


def _check_encodable(value: object) -> None:
    """Hold all texts in a value to what UTF-8 can write: half of a surrogate pair, which JSON can escape, is not."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8; save the file as UTF-8") from None
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_encodable(name)
            _check_encodable(item)
    elif isinstance(value, list):
        for item in value:
            _check_encodable(item)


def _tools(value: object) -> list[Any]:
    """Return tools as JSON schemas; a list of them, or the same as JSON text."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value or []
    except ValueError:
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"must be a list of tools, each a JSON schema, got {shown(value)}")
    return tools


def _content(value: object) -> str:
    """Return the text of a message: a string, nothing beside tool calls, or a list of parts that are texts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text")) for part in value)
    if isinstance(value, list):
        raise ValueError(f"a message may hold text only, got {shown(value)}")
    return "" if value is None else _text(value)
