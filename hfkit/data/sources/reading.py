"""Rows from files, from the standard library and from the Hub, as they come or in slices."""

import glob
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from hfkit.data.columns import BadRow, Columns, ReadRow
from hfkit.data.sources import stdlib
from hfkit.data.sources.files import (
    FORMATS,
    Lines,
    blocks_of,
    check_columns,
    format_of,
    is_of_lines,
    pieces,
    read_file,
)
from hfkit.errors import HfkitError, reason, way_to
from hfkit.recipe.fields import RecipePart

SLICE_CHARACTERS, SLICE_ROWS = 1 << 19, 500


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
    """Return the files of a `files` source, in the order of their names.

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
    """Yield the files in a folder and those below, each folder once.

    Raises:
        HfkitError: if one cannot be listed: its files would be missing without a word.
    """
    seen = set[Path]()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders.sort()
        if Path(parent).resolve() in seen:
            folders.clear()
            continue
        seen.add(Path(parent).resolve())
        yield from (Path(parent, name) for name in names if _is_file(Path(parent, name)))


def _refuse(error: OSError) -> None:
    raise HfkitError(f"{error.filename}: cannot be listed: {error.strerror}; allow it, or move it elsewhere") from None


def _is_file(path: Path) -> bool:
    """Return whether a path is a file.

    Raises:
        HfkitError: for a link to nothing in place of a file that would be read, but for editors' `.#name`.
    """
    if path.is_symlink() and not path.exists() and format_of(path) in FORMATS and not path.name.startswith("."):
        raise HfkitError(f"{path}: is a link to {os.readlink(path)}, which is not there; restore it or delete it")
    return path.is_file()


class Slice(NamedTuple):
    """A part of a source: rows that are read already, or lines that are still to be.

    Args:
        source: its index.
    """

    source: int
    rows: list[ReadRow | BadRow] | Lines


def slices(index: int, source: Source, columns: Columns) -> Iterator[Slice]:
    """Yield the rows that `read` gives, in slices that can be worked on apart. Lines are left to be read there."""
    if source.files is None or source.limit is not None:
        yield from (Slice(index, rows) for rows in _grouped(read(source, columns)))
        return
    names = names_in(source, columns)
    for has_lines, paths in itertools.groupby(files_of(source), lambda path: is_of_lines(path, source.document)):
        if has_lines:
            yield from (Slice(index, lines) for path in paths for lines in blocks_of(path))
        else:
            rows = itertools.chain.from_iterable(read_file(path, source.document, columns, names) for path in paths)
            yield from (Slice(index, group) for group in _grouped(rows))


def names_in(source: Source, columns: Columns) -> dict[str, str]:
    """Return the names that the columns have in a source."""
    return {name: source.columns.get(name, source.text if name == "text" else name) for name in columns.kinds}


def _grouped(rows: Iterator[ReadRow | BadRow]) -> Iterator[list[ReadRow | BadRow]]:
    """Yield rows in groups. Those before one that cannot be had come before the error."""
    group, size = list[ReadRow | BadRow](), 0
    failure = None
    try:
        for row in rows:
            group.append(row)
            size += 0 if isinstance(row, BadRow) else sum(len(value) for value in row.values.values())
            if size >= SLICE_CHARACTERS or len(group) >= SLICE_ROWS:
                yield group
                group, size = [], 0
    except HfkitError as error:
        failure = error
    if group:
        yield group
    if failure is not None:
        raise failure


def read(source: Source, columns: Columns, wanted: Callable[[str], bool] | None = None) -> Iterator[ReadRow | BadRow]:
    """Return the rows of a source, and in their place those that cannot be read.

    Args:
        wanted: of a module of a built-in source, whether its functions are wanted. By default all are.

    Raises:
        HfkitError: if the source as a whole cannot be read, or has no columns by these names.
    """
    names = names_in(source, columns)
    if source.builtin:
        rows = _read_builtin(source, columns, names, wanted)
    elif source.hub:
        rows = _read_hub(source, columns, names)
    else:
        rows = itertools.chain.from_iterable(
            read_file(path, source.document, columns, names) for path in files_of(source)
        )
    return itertools.islice(rows, source.limit)


def _read_builtin(
    source: Source, columns: Columns, names: dict[str, str], wanted: Callable[[str], bool] | None
) -> Iterator[ReadRow | BadRow]:
    if source.builtin == "python-stdlib":
        for module, content in stdlib.documents():
            for row in pieces(io.BytesIO(content), f"python-stdlib/{module}", source.document):
                yield row._replace(group=module) if isinstance(row, ReadRow) else row
        return
    functions = stdlib.functions if source.builtin == "python-functions" else stdlib.packages
    for function in functions(wanted):
        origin = f"{source.builtin}/{function['module']}:{function['line']}"
        yield columns.row(function, names, origin, group=str(function["module"]))


def _read_hub(source: Source, columns: Columns, names: dict[str, str]) -> Iterator[ReadRow | BadRow]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.hub, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
        check_columns(names, rows.column_names or list(next(iter(rows))), f"{source.hub} ({source.split})")
        for number, row in enumerate(rows):
            yield columns.row(row, names, f"{source.hub}/{source.split}:{number}")
    except HfkitError:
        raise
    except Exception as error:  # the loader raises whatever the network, the Hub or the files bring up
        way = way_to(source.hub or "")
        raise HfkitError(f"{source.hub}: cannot be loaded: {reason(error)}; check id, name and split; {way}") from None
