"""The rows of a prepared folder, or of a data set on the Hub that has the same three splits."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.artifacts.manifest import Json
from hfkit.errors import HfkitError, reason, way_to

if TYPE_CHECKING:
    import pyarrow

SPLITS = ("train", "validation", "test")
ROWS_READ_AT_ONCE = 256
Row = dict[str, Any]  # by column: a text, a list of texts, or a chat, which is a list of messages


def problem_with(path: str) -> str | None:
    """Return why a folder cannot serve as prepared data; None if it can. A Hub id is looked at when it is read."""
    missing = [f"{split}.parquet" for split in SPLITS if not (Path(path) / f"{split}.parquet").is_file()]
    if Path(path).is_dir() and missing:
        return f"{path}: has no {', '.join(missing)}; make it with a recipe of `stage: prepare`"
    return None


def columns_of(path: str) -> dict[str, str] | None:
    """Return the columns of a prepared folder and their kinds; None for an id on the Hub, which is looked at when
    read.

    Raises:
        HfkitError: if the training split cannot be read.
    """
    if not Path(path).is_dir():
        return None
    import pyarrow.parquet

    schema = _open(Path(path) / "train.parquet").schema_arrow
    columns = {}
    for field in schema:
        if pyarrow.types.is_list(field.type):
            columns[field.name] = "messages" if _is_chat(field.type) else "texts"
        else:
            columns[field.name] = "text"
    return columns


def _is_chat(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) and pyarrow.types.is_struct(kind.value_type)


def _message(stored: Json) -> Json:
    """Return a message of a chat with the fields that it has; tool calls are stored as JSON text."""
    fields = {name: value for name, value in stored.items() if value is not None}
    if isinstance(fields.get("tool_calls"), str):
        fields["tool_calls"] = json.loads(fields["tool_calls"])
    return fields


def stored_message(message: Json) -> dict[str, str]:
    """Return a message as Parquet holds it: tool calls have any shape, and so are JSON text."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in message.items()
    }


def texts(path: str, split: str) -> Iterator[str]:
    """Return the documents of a split, one after the other.

    Raises:
        HfkitError: if the split cannot be read or has no column `text`.
    """
    return (row["text"] for row in rows(path, split, ["text"]))


def rows(path: str, split: str, columns: list[str] | None = None) -> Iterator[Row]:
    """Return the rows of a split, one after the other, with the columns asked for or all.

    Raises:
        HfkitError: if the split cannot be read, has no such column, or has no value in one.
    """
    if Path(path).is_dir():
        return _folder_rows(Path(path) / f"{split}.parquet", columns)
    return _hub_rows(path, split, columns)


def read_split(path: str, split: str, limit: int | None = None) -> list[Row]:
    """Return the rows of a split, or the first of them.

    Raises:
        HfkitError: if there are none.
    """
    sample = list(itertools.islice(rows(path, split), limit))
    if not sample:
        raise HfkitError(f"data: the {split} split of {path} has no rows; choose another split")
    return sample


def _open(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise HfkitError(f"{path}: cannot be read: {error}; prepare the data again") from None


def _folder_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    import pyarrow

    file = _open(path)
    for name in columns or []:
        if name not in file.schema_arrow.names:
            raise HfkitError(f'{path}: has no column "{name}"; make it with a recipe of `stage: prepare`')
    try:
        for batch in file.iter_batches(batch_size=ROWS_READ_AT_ONCE, columns=columns):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if column.null_count:
                    raise HfkitError(
                        f'{path}: column "{name}" has empty values; make it with a recipe of `stage: prepare`'
                    )
            chats = [field.name for field in batch.schema if _is_chat(field.type)]
            for row in batch.to_pylist():
                for name in chats:
                    row[name] = [_message(message) for message in row[name]]
                yield row
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise HfkitError(f"{path}: cannot be read: {error}; prepare the data again") from None


def _hub_rows(repo: str, split: str, columns: list[str] | None) -> Iterator[Row]:
    import datasets

    try:
        for row in datasets.load_dataset(repo, split=split, streaming=True):
            values = {name: row[name] if row[name] is not None else "" for name in columns or row}
            for name, value in values.items():
                if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
                    values[name] = [_message(message) for message in value]
            yield values
    except Exception as error:  # the loader raises whatever the network, the Hub or the files bring up
        what = f" with a column {', '.join(columns)}" if columns else ""
        raise HfkitError(
            f"{repo}: split {split}{what} cannot be loaded from the Hub: {reason(error)}; {way_to(repo)}. A "
            f"recipe of `stage: prepare` with `hub: {repo}` makes the splits and takes any column"
        ) from None
