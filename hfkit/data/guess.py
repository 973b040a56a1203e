"""What the columns of a data file are for, by the names that they usually have.

A recipe may name a data file, or several by a glob, where it takes a data set: `prepare` then runs with its defaults,
on the columns that are found here.
"""

import csv
import io
import json
import zlib
from pathlib import Path
from typing import NamedTuple

from hfkit.artifacts.manifest import Json
from hfkit.data.columns import Kind
from hfkit.data.corpus import Row
from hfkit.data.sources.files import FORMATS, format_of, open_file
from hfkit.data.sources.reading import Source, files_of
from hfkit.data.tasks import Task
from hfkit.data.tasks.templates import fields_of
from hfkit.errors import HfkitError, shown

KINDS: dict[str, Kind] = {"messages": "messages", "label": "label"}
TEMPLATES = ("prompt", "completion")


class Guess(NamedTuple):
    """
    Args:
        columns: of the data set, with their kinds.
        keys: that the recipe does not set: what they are by the names of the columns.
        names: of each of them the columns, for a person.
    """

    columns: dict[str, Kind]
    keys: dict[str, str]
    names: dict[str, str]


def is_data_file(source: str) -> bool:
    """Return whether a place is a file, a glob, or a folder of files that hfkit reads, and no data set yet."""
    path = Path(source)
    if any(character in source for character in "*?["):
        return True
    if path.is_dir():
        return not any(path.glob("*.parquet")) and any(format_of(file) in FORMATS for file in path.rglob("*"))
    return format_of(path) in FORMATS


def guess(files: str, task: type[Task], values: Json) -> Guess:
    """Return the columns of data files for a task.

    Args:
        values: the recipe's own, which say what they name.

    Raises:
        HfkitError: if there are no such files, or their columns do not tell; it shows them.
    """
    first = files_of(Source(files=files))[0]
    row = _first_row(first)
    columns: dict[str, Kind] = {}
    keys, names = {}, {}
    for key, usual in task.usual.items():
        value = values.get(key)
        if value is not None and not isinstance(value, str):
            continue  # which is told elsewhere
        if value is not None:
            fields: tuple[str, ...] | None = tuple(fields_of(value)) if key in TEMPLATES else (value,)
            if row and not row.keys() >= set(fields or ()):
                raise HfkitError(_unknown(first, row, task.name, key))
        else:
            fields = next((some for some in usual if row.keys() >= {*some}), None)
            if fields is None:
                raise HfkitError(_unknown(first, row, task.name, key))
            if key != "text":
                keys[key] = "\n".join(f"{{{name}}}" for name in fields) if key in TEMPLATES else fields[0]
            names[key] = " and ".join(fields)
        columns |= {name: _kind(key, row.get(name)) for name in fields or ()}
    if task.is_chat and "tools" in row:
        columns["tools"] = "tools"
    return Guess(columns, keys, names)


def _kind(key: str, value: object) -> Kind:
    """Return the kind of a column that serves a key. Whether a row has one class or a list of them is seen in the
    first."""
    is_list = isinstance(value, list) or (isinstance(value, str) and value.startswith("["))
    return "labels" if key == "label" and is_list else KINDS.get(key, "text")


def _unknown(path: Path, row: Row, task: str, key: str) -> str:
    """Return the columns, and the two lines that say what they are."""
    there = "\n".join(f"    {name}: {shown(value)}" for name, value in row.items())
    several = "{<column>}" if key in TEMPLATES else "<column>"
    lines = f"    {key}: '{several}'" if key != "text" else "    text: <column>   # of a source of `stage: prepare`"
    return (
        f"{path}: no column is known to be the {key}. Its columns, with the first row:\n{there}\n"
        f"  Say which in the recipe:\n    task: {task}\n{lines}"
    )


def _first_row(path: Path) -> Row:
    """Return the first row of a file by its columns; empty where it has none that can be read, which `prepare`
    tells."""
    try:
        return _read_first(path)
    except (OSError, EOFError, zlib.error, csv.Error):
        return {}


def _read_first(path: Path) -> Row:
    kind = format_of(path)
    if kind == ".parquet":
        import pyarrow.parquet

        try:
            with open_file(path) as file:
                batches = pyarrow.parquet.ParquetFile(io.BytesIO(file.read())).iter_batches(batch_size=1)
                return next((batch.to_pylist()[0] for batch in batches if len(batch)), {})
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise HfkitError(f"{path}: not a Parquet file: {error}; restore or remove the file") from None
    if kind not in (".jsonl", ".csv"):
        return {"text": ""}
    with open_file(path) as file:
        if kind == ".csv":
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
            return next(csv.DictReader(text), {})
        for line in file:
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError:
                continue
            if isinstance(row, dict):
                return row
    return {}
