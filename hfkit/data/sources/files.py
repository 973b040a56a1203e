"""Rows from files, one reader a format. Whatever the bytes are, there come rows, bad rows, or one error."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from hfkit.data.columns import BadRow, Columns, ReadRow
from hfkit.errors import HfkitError, did_you_mean

FORMATS = (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet")  # also compressed: .gz, .zst
PASSAGE_CHARACTERS = 4000
BLOCK_BYTES = 1 << 19


class Lines(NamedTuple):
    """Whole lines of a file, each a row that is still to be read; `first` is the number of the first."""

    path: Path
    first: int
    content: bytes


def format_of(path: Path) -> str:
    """Return the suffix below the compression: `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in (".gz", ".zst") else path.suffix.lower()


def open_file(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow  # its reader notices where a file is cut off, and gives lines

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def read_file(path: Path, document: str, columns: Columns, names: dict[str, str]) -> Iterator[ReadRow | BadRow]:
    """Yield the rows of a file.

    Raises:
        HfkitError: if the file cannot be read, or has no columns by these names.
    """
    if is_of_lines(path, document):
        for lines in blocks_of(path):
            yield from read_lines(lines, columns, names)
    elif format_of(path) == ".csv":
        with _reading(path), open_file(path) as file:
            yield from _read_csv(file, path, columns, names)
    elif format_of(path) == ".parquet":
        with _reading(path):
            yield from _read_parquet(path, columns, names)
    else:
        _check_kinds(path, columns)
        with _reading(path), open_file(path) as file:
            yield from pieces(file, str(path), document)


def is_of_lines(path: Path, document: str) -> bool:
    """Return whether each line of a file is a row by itself, so that any block of its lines can be read alone."""
    return format_of(path) == ".jsonl" or (format_of(path) not in (".csv", ".parquet") and document == "line")


def blocks_of(path: Path) -> Iterator[Lines]:
    """Yield a file in blocks of about `BLOCK_BYTES`. Lines before a place that cannot be read come before the
    error."""
    lines, size, first = list[bytes](), 0, 1
    failure = None
    try:
        with _reading(path), open_file(path) as file:
            for line in file:
                lines.append(line)
                size += len(line)
                if size >= BLOCK_BYTES:
                    yield Lines(path, first, b"".join(lines))
                    lines, size, first = [], 0, first + len(lines)
    except HfkitError as error:
        failure = error
    if lines:
        yield Lines(path, first, b"".join(lines))
    if failure is not None:
        raise failure


def read_lines(lines: Lines, columns: Columns, names: dict[str, str]) -> Iterator[ReadRow | BadRow]:
    """Yield the rows of some lines of a file."""
    numbered = enumerate(io.BytesIO(lines.content), lines.first)
    if format_of(lines.path) == ".jsonl":
        yield from _read_jsonl(numbered, lines.path, columns, names)
        return
    _check_kinds(lines.path, columns)
    for number, line in numbered:
        row = _decode(line, f"{lines.path}:{number}")
        yield ReadRow({"text": row.values["text"].rstrip("\r\n")}, row.origin) if isinstance(row, ReadRow) else row


def pieces(file: IO[bytes], origin: str, document: str) -> Iterator[ReadRow | BadRow]:
    """Yield a text as one document, as lines or as passages; the last two without holding all of it in memory."""
    if document == "file":
        yield _decode(file.read(), origin)
        return
    passage, characters, first = [], 0, 1
    for number, line in enumerate(file, 1):
        row = _decode(line, f"{origin}:{number}")
        if isinstance(row, BadRow):
            yield row
        elif document == "line":
            yield ReadRow({"text": row.values["text"].rstrip("\r\n")}, row.origin)
        else:
            passage.append(row.values["text"])
            characters += len(passage[-1])
            if characters >= PASSAGE_CHARACTERS and not passage[-1].strip():
                yield ReadRow({"text": "".join(passage)}, f"{origin}:{first}")
                passage, characters, first = [], 0, number + 1
    if passage:
        yield ReadRow({"text": "".join(passage)}, f"{origin}:{first}")


def check_columns(names: dict[str, str], there: Collection[str], origin: str) -> None:
    """
    Raises:
        HfkitError: if a source lacks one of the columns that are asked for.
    """
    for column, name in names.items():
        if name not in there:
            key = "text" if column == "text" else f"columns.{column}"
            raise HfkitError(f'{origin}: has no column "{name}", {did_you_mean(name, there)}; set {key}: <column>')


def _check_kinds(path: Path, columns: Columns) -> None:
    if columns.kinds != {"text": "text"}:
        raise HfkitError(f"{path}: a {format_of(path)} file has a text only, not {', '.join(columns.kinds)}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise HfkitError(f"{path}: cannot be read: {error}; restore or remove the file") from None


def _decode(content: bytes, origin: str) -> ReadRow | BadRow:
    """Decode UTF-8, with or without a byte-order mark."""
    try:
        return ReadRow({"text": content.decode().removeprefix("\ufeff")}, origin)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = origin if origin.rpartition(":")[2].isdigit() else f"{origin}:{line}"
        return BadRow(where, f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8")


def _read_jsonl(
    lines: Iterable[tuple[int, bytes]], path: Path, columns: Columns, names: dict[str, str]
) -> Iterator[ReadRow | BadRow]:
    for number, line in lines:
        origin = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield BadRow(origin, f"byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            yield BadRow(origin, f"not a JSON object: {error}")
        else:
            if not isinstance(row, dict):
                yield BadRow(origin, f"not a JSON object but {type(row).__name__}; write one object a line")
            else:
                yield columns.row(row, names, origin)


def _read_csv(file: IO[bytes], path: Path, columns: Columns, names: dict[str, str]) -> Iterator[ReadRow | BadRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # it is a C long, of 32 bits on Windows
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if "end of data" in str(error) or header is None:
                raise HfkitError(
                    f"{path}:{first}: not CSV: a quote that is opened in this row is never closed; close it"
                    if header is not None
                    else f"{path}:{first}: not CSV: {error}; correct its header"
                ) from None
            yield BadRow(f"{path}:{first}", f"not CSV: {error}; close its quotes", reader.line_num - first + 1)
            continue
        if header is None:
            header = fields
            check_columns(names, header, str(path))
        elif len(fields) > len(header):
            lines = reader.line_num - first + 1
            yield BadRow(f"{path}:{first}", "has more fields than the header; put it in quotes", lines)
        elif fields:
            row = columns.row(dict(itertools.zip_longest(header, fields)), names, f"{path}:{first}")
            yield row if isinstance(row, ReadRow) else row._replace(lines=reader.line_num - first + 1)
    if header is None:
        check_columns(names, [], str(path))


def _read_parquet(path: Path, columns: Columns, names: dict[str, str]) -> Iterator[ReadRow | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as file:
            # A compressed Parquet file is read whole: the format needs to seek, and compresses by itself anyway.
            table = pyarrow.parquet.ParquetFile(path if path.suffix == ".parquet" else io.BytesIO(file.read()))
            check_columns(names, table.schema_arrow.names, str(path))
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=list(dict.fromkeys(names.values()))):
                for row in _rows_of(batch):
                    origin = f"{path}:{number}"
                    yield columns.row(row, names, origin) if isinstance(row, dict) else BadRow(origin, row)
                    number += 1
    except pyarrow.ArrowException as error:
        raise HfkitError(f"{path}: not a Parquet file: {error}; restore or remove the file") from None


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a record batch; in the place of one that Python cannot hold, what is wrong with it."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
        for index in range(len(batch)):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield f"a value cannot be read: {error}; correct it"
