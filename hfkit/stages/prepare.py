"""Rows from anywhere to three Parquet files: checked, cleaned, each once, split by their own hash."""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from hfkit.bars import Bar
from hfkit.data import sources, stdlib
from hfkit.data.columns import FIELDS, BadRow, Columns, Kind, Row
from hfkit.data.sources import Source
from hfkit.errors import HfkitError, did_you_mean
from hfkit.manifest import sha256_of
from hfkit.planning.work import Chore, Known, Work
from hfkit.privacy import without_places
from hfkit.ranks import say
from hfkit.recipe import Push, RecipePart, StageRecipe

MAKES, DISTRIBUTED = "data set", False
SPLITS = ("train", "validation", "test")
SHOWN_BAD_ROWS = 20
CONTEXT = 6  # characters on both sides; the longest of ftfy's patterns has 7, one of them not ASCII
_NON_ASCII = re.compile(rf"[^\x00-\x7f]+(?:[\x00-\x7f]{{1,{2 * CONTEXT}}}[^\x00-\x7f]+)*")
CLEANED_A_SECOND, PACKED = 2e7, 0.3  # of a plan: bytes cleaned and written, and their share on the disk


class BadRows(RecipePart):
    skip: float = pydantic.Field(ge=0, lt=1, description="Leave out at most this share of the rows, such as 0.01.")


class Split(RecipePart):
    validation: float = pydantic.Field(0.05, gt=0, lt=0.5, description="Share of the rows kept for validation.")
    test: float = pydantic.Field(0.05, gt=0, lt=0.5, description="Share of the rows kept for testing.")
    by: str | None = pydantic.Field(
        None, description="Column whose rows of one value stay together. The built-in sources keep modules together."
    )


class Recipe(StageRecipe):
    """Rows from files, the standard library or the Hub: documents, or the examples of a task."""

    stage: Literal["prepare"]
    sources: Annotated[list[Source], pydantic.Field(min_length=1)]
    columns: dict[str, Kind] = pydantic.Field(
        {"text": "text"},
        min_length=1,
        description="The columns of a row, each text, texts (a list), label (a class), messages (a chat) or tools "
        "(what the assistant of a chat may call, as JSON schemas).",
    )
    labels: list[str] | None = pydantic.Field(
        None, min_length=1, description="Names of the classes: others are refused, numbers are places in this list."
    )
    split: Split = Split()
    repair: bool = pydantic.Field(True, description="Mend wrongly decoded text (mojibake) with ftfy.")
    deduplicate: bool | list[str] = pydantic.Field(
        True, description="Keep one of several rows that are the same, or the same in the columns named here."
    )
    min_characters: int = pydantic.Field(1, ge=1, description="Drop rows with less text.")
    bad_rows: BadRows | None = pydantic.Field(None, description="By default the first unreadable row stops the run.")
    push: Push | None = None


def check(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Iterator[tuple[str, str]]:
    for index, source in enumerate(recipe.sources):
        if source.files is not None:
            try:
                sources.files_of(source)
            except HfkitError as error:
                yield f"sources.{index}.files", str(error)
        for name in source.columns:
            if name not in recipe.columns:
                yield f"sources.{index}.columns.{name}", f"is not in `columns`, {did_you_mean(name, recipe.columns)}"
        if source.into in recipe.split.model_fields_set:
            yield f"split.{source.into}", f"sources.{index} goes into {source.into}, which takes no others; delete one"
    named = [("split.by", recipe.split.by)] if recipe.split.by else []
    named += [("deduplicate", name) for name in recipe.deduplicate] if isinstance(recipe.deduplicate, list) else []
    for key, name in named:
        if name not in recipe.columns:
            yield key, f"{name}: is not in `columns`, {did_you_mean(name, recipe.columns)}"
    if recipe.labels is not None and "label" not in recipe.columns.values():
        yield "labels", "no column is a label; write `columns: {<name>: label}`"


def external(recipe: Recipe) -> dict[str, Any]:
    """The content behind the sources, as far as it lies on this machine."""
    files = [path for source in recipe.sources if source.files for path in sources.files_of(source)]
    found: dict[str, Any] = {str(path): sha256_of(path) for path in files}
    if any(source.builtin for source in recipe.sources):
        found["python-stdlib"] = stdlib.version()
    return found


def describe(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> dict[str, Any]:
    return {"sources": ", ".join(source.builtin or source.files or source.hub or "" for source in recipe.sources)}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.planning.sources import Look

    names = recipe.deduplicate if isinstance(recipe.deduplicate, list) else list(recipe.columns)
    claimed = {source.into for source in recipe.sources}

    def found(row: Row) -> tuple[str, bytes] | None:
        texts = [text for value in row.values.values() for text in _texts_of(value)]
        if not all(text.strip() for text in texts) or sum(map(len, texts)) < recipe.min_characters:
            return None
        key = _key(row.values, names)
        group = str(row.values[recipe.split.by]) if recipe.split.by else row.group
        return split_of(key if group is None else _digest(group), recipe.split, claimed), key

    def of_module(name: str) -> str:
        return split_of(_digest(name), recipe.split, claimed)

    look = Look(Columns(recipe.columns, recipe.labels), found, None if recipe.split.by else of_module)
    for source in recipe.sources:
        if source.hub is None:
            look.at(source)
    texts, size = look.texts(), sum(look.bytes.values())
    hubs = [source.hub for source in recipe.sources if source.hub is not None]
    notes = tuple(f"{hub} is on the Hub: how much it holds is not known here, nor how long it takes" for hub in hubs)
    memory = 4e7 + 6 * min(size, 2 * ParquetWriters.BATCH_BYTES)
    return Work(
        [Chore("preparing", look.seconds + 0.3 + size / CLEANED_A_SECOND, memory)] if size else [],
        makes=texts if not hubs else None,
        disk=size * PACKED,
        notes=notes,
        is_exact=texts.is_exact and not hubs,
    )


def run(recipe: Recipe, places: dict[str, str], output: Path) -> dict[str, Any]:
    kept, dropped, seen = Counter[str](), Counter[str](), set[bytes]()
    characters, size = Counter[str](), Counter[str]()
    bad_rows: list[BadRow] = []
    columns = Columns(recipe.columns, recipe.labels)
    # Rows of test and validation come first, so that it is training that loses the duplicates.
    first = sorted(recipe.sources, key=lambda source: {"test": 0, "validation": 1}.get(source.into or "", 2))
    claimed = {source.into for source in recipe.sources}
    with (
        ParquetWriters(output, recipe.columns) as writers,
        Bar(unit=" rows", desc="preparing", leave=True) as bar,
    ):
        for source, row in ((each, row) for each in first for row in sources.read(each, columns)):
            bar.update()
            row = row._replace(origin=_origin(row.origin))
            if isinstance(row, BadRow):
                if recipe.bad_rows is None:
                    remedy = "mend the row, or allow a share of bad rows: `bad_rows: {skip: 0.01}`"
                    raise HfkitError(f"{row.origin}: {row.reason}; {remedy}")
                bad_rows.append(row)
                continue
            values = {name: _cleaned(value, recipe.repair) for name, value in row.values.items()}
            texts = [text for value in values.values() for text in _texts_of(value)]
            length = sum(map(len, texts))
            key = _key(values, recipe.deduplicate if isinstance(recipe.deduplicate, list) else list(values))
            if not all(text.strip() for text in texts):
                dropped["empty"] += 1
            elif length < recipe.min_characters:
                dropped["too short"] += 1
            elif recipe.deduplicate and key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                group = str(values[recipe.split.by]) if recipe.split.by else row.group
                split = source.into or split_of(key if group is None else _digest(group), recipe.split, claimed)
                for _ in range(_times(source.weight, key) if split == "train" else 1):
                    writers.write(split, Row(values, row.origin), length)
                    kept[split] += 1
                    characters[split] += length
                    size[split] += sum(len(text.encode()) for text in texts)

    dropped["bad row"] = sum(row.lines for row in bad_rows)
    _check_bad_rows(bad_rows, kept.total() + dropped.total(), recipe.bad_rows)
    for split in SPLITS:
        if not kept[split]:
            lost = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count)
            raise HfkitError(
                f"{split}: no rows ({kept.total()} in all{f'; dropped: {lost}' if lost else ''}); give more data"
                + (", or cut them smaller with `document: passage`" if kept.total() else "")
            )
    metrics: dict[str, Any] = {
        "rows": kept.total(),
        "bytes": size.total(),
        "splits": {
            split: {"rows": kept[split], "bytes": size[split], "characters": characters[split]} for split in SPLITS
        },
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "bad_rows": [_printable(f"{row.origin}: {row.reason}") for row in bad_rows[:SHOWN_BAD_ROWS]],
    }
    for split in SPLITS:
        say(f"  {split:<10} {kept[split]:>9,} rows  {size[split] / 1e6:9.2f} MB")
    if columns.left_out:
        fields = ", ".join(f"{name} ({count:,})" for name, count in columns.left_out.most_common())
        say(f"  WARNING: messages hold fields that are not kept: {fields}")
        metrics["left_out"] = dict(columns.left_out)
    say("  dropped    " + (", ".join(f"{dropped[reason]:,} {reason}" for reason in metrics["dropped"]) or "nothing"))
    return metrics


def _origin(origin: str) -> str:
    """`books.jsonl:17` as it may be stored."""
    place, colon, line = origin.rpartition(":")
    return f"{_place(place)}:{line}" if colon and line.isdigit() else _place(origin)


@functools.lru_cache(maxsize=4096)
def _place(place: str) -> str:
    return _printable(without_places(place))


def _printable(text: str) -> str:
    """File names and keys may hold what is not Unicode."""
    return text.encode(errors="backslashreplace").decode()


def _cleaned(value: Any, repair: bool) -> Any:
    """A value with every text in it clean."""
    if isinstance(value, str):
        return clean(value, repair)
    if isinstance(value, dict):
        return {name: _cleaned(each, repair) for name, each in value.items()}
    return [_cleaned(each, repair) for each in value] if isinstance(value, list) else value


def _texts_of(value: Any) -> Iterator[str]:
    """The texts of a value that must not be empty; of a message what it says, or else the tools that it calls."""
    for each in [value] if isinstance(value, str) else value:
        if isinstance(each, str):
            yield each
        elif "role" in each:
            yield each["content"] if each["content"].strip() else json.dumps(each.get("tool_calls", ""))[1:-1]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _key(values: dict[str, Any], names: list[str]) -> bytes:
    """What tells rows apart: the one text there is, or all that the columns hold."""
    if len(names) == 1 and isinstance(values[names[0]], str):
        return _digest(values[names[0]])
    return _digest(json.dumps([values[name] for name in names], ensure_ascii=False))


def _times(weight: float, key: bytes) -> int:
    """How often a row is written: the whole part of the weight, and once more for as large a share of the rows."""
    return int(weight) + (int.from_bytes(key[8:], "big") / 2**64 < weight % 1)


def clean(text: str, repair: bool) -> str:
    """Unicode NFC, with text that was decoded wrongly mended. ASCII has nothing to mend and is passed as it is."""
    if text.isascii():
        return text
    if repair and _may_be_mojibake(text):
        import ftfy

        # Only the encoding is mended: quotes, ligatures and widths are the author's.
        text = ftfy.fix_encoding(text)
    return unicodedata.normalize("NFC", text)


def _may_be_mojibake(text: str) -> bool:
    """Return whether ftfy finds wrongly decoded text, by a look at what is not ASCII and at `CONTEXT` around it.

    The verdict is that on the whole text, which takes most of the time of a preparation: each of ftfy's patterns needs
    a character that is not ASCII and is too short to reach from one to the end of its window. So nothing is cut off,
    and nothing is found across the NUL between two windows.
    """
    from ftfy.badness import is_bad

    places = (match.span() for match in _NON_ASCII.finditer(text))
    return is_bad("\0".join([text[max(start - CONTEXT, 0) : end + CONTEXT] for start, end in places]))


def split_of(key: bytes, split: Split, claimed: Collection[str | None] = ()) -> str:
    """The split of a row, decided by its own hash: it stays where it is when the data grows. Validation or test gets
    none if it is `claimed` by a source of its own."""
    share = int.from_bytes(key[:8], "big") / 2**64
    test = 0.0 if "test" in claimed else split.test
    if share < test:
        return "test"
    return "validation" if "validation" not in claimed and share < test + split.validation else "train"


def _check_bad_rows(bad_rows: list[BadRow], total: int, allowed: BadRows | None) -> None:
    lines = sum(row.lines for row in bad_rows)
    if allowed is None or lines <= allowed.skip * total:
        return
    shown = "\n".join(f"  {row.origin}: {row.reason}" for row in bad_rows[:SHOWN_BAD_ROWS])
    raise HfkitError(
        f"bad_rows.skip={allowed.skip}: {lines} of {total} rows are bad, more than that share; "
        f"correct them or raise it:\n{shown}"
    )


def _stored(value: Any, kind: Kind) -> Any:
    """A value as Parquet holds it: what tools take, and what they are called with, has any shape and so is JSON."""
    if kind == "tools":
        return json.dumps(value, ensure_ascii=False)
    if kind != "messages":
        return value
    return [
        {name: each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for name, each in turn.items()}
        for turn in value
    ]


class ParquetWriters:
    """One Parquet file a split, written in batches so that memory does not grow with the data."""

    BATCH_BYTES = 32 << 20

    def __init__(self, folder: Path, kinds: dict[str, Kind]):
        import pyarrow
        import pyarrow.parquet

        self.pyarrow = pyarrow
        message = pyarrow.struct([(name, pyarrow.string()) for name in ("role", "content", *FIELDS)])
        types = {
            "text": pyarrow.large_string(),
            "texts": pyarrow.list_(pyarrow.large_string()),
            "label": pyarrow.string(),
            "messages": pyarrow.list_(message),
            "tools": pyarrow.large_string(),
        }
        self.kinds = kinds
        self.schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()] + [("source", "string")])
        self.files = {
            split: pyarrow.parquet.ParquetWriter(folder / f"{split}.parquet", self.schema, compression="zstd")
            for split in SPLITS
        }
        self.columns: dict[str, dict[str, list[Any]]] = {split: self._empty() for split in SPLITS}
        self.waiting = Counter[str]()

    def write(self, split: str, row: Row, length: int) -> None:
        columns = self.columns[split]
        for name, kind in self.kinds.items():
            columns[name].append(_stored(row.values[name], kind))
        columns["source"].append(row.origin)
        self.waiting[split] += length
        if self.waiting[split] >= self.BATCH_BYTES:
            self._flush(split)

    def _flush(self, split: str) -> None:
        columns = self.columns[split]
        if columns["source"]:
            arrays = [self.pyarrow.array(columns[field.name], field.type) for field in self.schema]
            self.files[split].write_table(self.pyarrow.Table.from_arrays(arrays, schema=self.schema))
        self.columns[split], self.waiting[split] = self._empty(), 0

    def _empty(self) -> dict[str, list[Any]]:
        return {name: [] for name in self.schema.names}

    def __enter__(self) -> "ParquetWriters":
        return self

    def __exit__(self, *error: object) -> None:
        for split, file in self.files.items():
            if error[0] is None:
                self._flush(split)
            file.close()
