"""Rows from files, from the standard library and from the Hub, one reader a format."""

import csv
import glob
import gzip
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, model_validator

from hfkit.data import stdlib
from hfkit.data.columns import BadRow, Columns, Row
from hfkit.errors import HfkitError, did_you_mean, reason, way_to
from hfkit.recipe import RecipePart

FORMATS = (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet")  # also compressed: .gz, .zst
PASSAGE_CHARACTERS = 4000


class Source(RecipePart):
    """Where documents come from: exactly one of `builtin`, `files` and `hub`."""

    builtin: Literal["python-stdlib", "python-functions", "python-packages"] | None = Field(
        None,
        description="Of the Python that runs hfkit, no download. python-stdlib: the text of its standard library. "
        "python-functions: functions (code) and the first line of their docstrings (summary). python-packages: "
        "functions (code) and the package they are from (package).",
    )
    files: str | None = Field(None, min_length=1, description="A file, a folder or a glob, such as texts/*.jsonl.gz.")
    hub: str | None = Field(None, description="Id of a data set on the Hugging Face Hub.")
    name: str | None = Field(None, description="Configuration of the Hub data set.")
    split: str = Field("train", description="Split of the Hub data set.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub data set.")
    streaming: bool = Field(False, description="Read the Hub data set row by row instead of downloading it first.")
    text: str = Field("text", description="Column with the text, in formats that have columns.")
    columns: dict[str, str] = Field({}, description="Other names that this source has for columns: ours -> its own.")
    into: Literal["train", "validation", "test"] | None = Field(
        None,
        description="The split that all rows of this source are for, such as a data set's own test split. By default "
        "a row's hash decides. Validation and test, where a source goes into them, take no rows of others.",
    )
    weight: float = Field(
        1.0, gt=0, description="How often each row is in the training split; 0.5 takes half of them."
    )
    document: Literal["file", "line", "passage"] = Field(
        "file",
        description="What one document of a .txt, .md or .py file is: the file, a line, or a passage of about 4,000 "
        "characters that ends at an empty line.",
    )
    limit: int | None = Field(None, ge=1, description="Take no more than this many documents.")

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if sum(value is not None for value in (self.builtin, self.files, self.hub)) != 1:
            raise ValueError("must have exactly one of builtin, files and hub")
        if self.hub is None and (self.name or self.revision or self.streaming):
            raise ValueError("name, revision and streaming belong to a hub data set; delete them or name a hub")
        if self.hub is None and "split" in self.model_fields_set:
            raise ValueError(f"split={self.split}: belongs to a hub data set; what rows are for is `into: <split>`")
        return self


def files_of(source: Source) -> list[Path]:
    """The files of a `files` source, in the order of their names.

    Links are followed. A file that several names lead to is read once, so that links may lead in circles.

    Raises:
        HfkitError: if there are none, or one is in a format that hfkit does not read.
    """
    pattern = Path(source.files or "").expanduser()
    if pattern.is_dir():
        paths = [path for path in _walk(pattern) if format_of(path) in FORMATS]
    elif not pattern.is_file() and glob.has_magic(str(pattern)):
        paths = [Path(name) for name in glob.glob(str(pattern), recursive=True) if Path(name).is_file()]
    else:
        paths = [pattern] if pattern.is_file() else []
    if not paths:
        raise HfkitError(f"{source.files}: no such file; name a file, a folder or a glob that exists")
    for path in paths:
        if format_of(path) not in FORMATS:
            unknown = format_of(path) or "without a suffix"
            raise HfkitError(f"{path}: format {unknown} is not read; known: {' '.join(FORMATS)} (.gz, .zst)")
    by_shortest = sorted(paths, key=lambda path: (len(path.parts), path))
    return sorted({path.resolve(): path for path in reversed(by_shortest)}.values())


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and those below, each folder once."""
    seen = set[Path]()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if Path(place).resolve() in seen:
            folders.clear()
            continue
        seen.add(Path(place).resolve())
        yield from (Path(place, name) for name in names if Path(place, name).is_file())


def read(source: Source, columns: Columns, wanted: Callable[[str], bool] | None = None) -> Iterator[Row | BadRow]:
    """The rows of a source, and in their place those that cannot be read.

    Args:
        wanted: of a module of a built-in source, whether its functions are wanted. By default all are.

    Raises:
        HfkitError: if the source as a whole cannot be read, or has no columns by these names.
    """
    names = {name: source.columns.get(name, source.text if name == "text" else name) for name in columns.kinds}
    if source.builtin:
        rows = _read_builtin(source, columns, names, wanted)
    elif source.hub:
        rows = _read_hub(source, columns, names)
    else:
        rows = itertools.chain.from_iterable(_read_file(path, source, columns, names) for path in files_of(source))
    return itertools.islice(rows, source.limit)


def _read_builtin(
    source: Source, columns: Columns, names: dict[str, str], wanted: Callable[[str], bool] | None
) -> Iterator[Row | BadRow]:
    if source.builtin == "python-stdlib":
        for module, content in stdlib.documents():
            for row in _pieces(io.BytesIO(content), f"python-stdlib/{module}", source.document):
                yield row._replace(group=module) if isinstance(row, Row) else row
        return
    functions = stdlib.functions if source.builtin == "python-functions" else stdlib.packages
    for found in functions(wanted):
        origin = f"{source.builtin}/{found['module']}:{found['line']}"
        yield columns.row(found, names, origin, group=str(found["module"]))


def _read_hub(source: Source, columns: Columns, names: dict[str, str]) -> Iterator[Row | BadRow]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.hub, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
        _check_columns(names, rows.column_names or list(next(iter(rows))), f"{source.hub} ({source.split})")
        for number, row in enumerate(rows):
            yield columns.row(row, names, f"{source.hub}/{source.split}:{number}")
    except HfkitError:
        raise
    except Exception as error:  # the loader raises whatever the network, the Hub or the files bring up
        way = way_to(source.hub or "")
        raise HfkitError(f"{source.hub}: cannot be loaded: {reason(error)}; check id, name and split; {way}") from None


def _read_file(path: Path, source: Source, columns: Columns, names: dict[str, str]) -> Iterator[Row | BadRow]:
    readers: dict[str, Callable[[Path, Columns, dict[str, str]], Iterator[Row | BadRow]]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    try:
        if format_of(path) in readers:
            yield from readers[format_of(path)](path, columns, names)
        elif columns.kinds != {"text": "text"}:
            raise HfkitError(f"{path}: a {format_of(path)} file has a text only, not {', '.join(columns.kinds)}")
        else:
            with open_file(path) as file:
                yield from _pieces(file, str(path), source.document)
    except (OSError, EOFError, zlib.error) as error:
        raise HfkitError(f"{path}: cannot be read: {error}; restore or remove the file") from None


def format_of(path: Path) -> str:
    """The suffix below the compression: `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in (".gz", ".zst") else path.suffix.lower()


def open_file(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow  # its reader notices where a file is cut off, and gives lines

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _pieces(file: IO[bytes], origin: str, document: str) -> Iterator[Row | BadRow]:
    """A file as documents of the kind asked for; lines and passages without holding the file in memory."""
    if document == "file":
        yield _decode(file.read(), origin)
        return
    passage, characters, first = [], 0, 1
    for number, line in enumerate(file, 1):
        row = _decode(line, f"{origin}:{number}")
        if isinstance(row, BadRow):
            yield row
        elif document == "line":
            yield Row({"text": row.values["text"].rstrip("\r\n")}, row.origin)
        else:
            passage.append(row.values["text"])
            characters += len(passage[-1])
            if characters >= PASSAGE_CHARACTERS and not passage[-1].strip():
                yield Row({"text": "".join(passage)}, f"{origin}:{first}")
                passage, characters, first = [], 0, number + 1
    if passage:
        yield Row({"text": "".join(passage)}, f"{origin}:{first}")


def _decode(content: bytes, origin: str) -> Row | BadRow:
    """UTF-8, with or without a byte-order mark."""
    try:
        return Row({"text": content.decode().removeprefix("\ufeff")}, origin)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = origin if origin.rpartition(":")[2].isdigit() else f"{origin}:{line}"
        return BadRow(where, f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8")


def _read_jsonl(path: Path, columns: Columns, names: dict[str, str]) -> Iterator[Row | BadRow]:
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
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


def _read_csv(path: Path, columns: Columns, names: dict[str, str]) -> Iterator[Row | BadRow]:
    csv.field_size_limit(sys.maxsize)
    with open_file(path) as file:
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
                _check_columns(names, header, str(path))
            elif len(fields) > len(header):
                yield BadRow(f"{path}:{first}", "has more fields than the header; put it in quotes")
            elif fields:
                yield columns.row(dict(itertools.zip_longest(header, fields)), names, f"{path}:{first}")
    if header is None:
        _check_columns(names, [], str(path))


def _read_parquet(path: Path, columns: Columns, names: dict[str, str]) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as file:
            # A compressed Parquet file is read whole: the format needs to seek, and compresses by itself anyway.
            table = pyarrow.parquet.ParquetFile(path if path.suffix == ".parquet" else io.BytesIO(file.read()))
            _check_columns(names, table.schema_arrow.names, str(path))
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=list(dict.fromkeys(names.values()))):
                for found in batch.to_pylist():
                    yield columns.row(found, names, f"{path}:{number}")
                    number += 1
    except pyarrow.ArrowInvalid as error:
        raise HfkitError(f"{path}: not a Parquet file: {error}; restore or remove the file") from None


def _check_columns(names: dict[str, str], there: Any, origin: str) -> None:
    for column, name in names.items():
        if name not in there:
            key = "text" if column == "text" else f"columns.{column}"
            raise HfkitError(f'{origin}: has no column "{name}", {did_you_mean(name, there)}; set {key}: <column>')
