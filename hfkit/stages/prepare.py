"""Documents from anywhere to three Parquet files: cleaned, each once, split by their own hash."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from tqdm import tqdm

from hfkit.data import sources, stdlib
from hfkit.data.sources import BadRow, Document, Source
from hfkit.errors import HfkitError
from hfkit.manifest import sha256_of
from hfkit.ranks import say
from hfkit.recipe import RecipePart, StageRecipe

MAKES, DISTRIBUTED = "data set", False
SPLITS = ("train", "validation", "test")
SHOWN_BAD_ROWS = 20


class BadRows(RecipePart):
    skip: float = pydantic.Field(ge=0, lt=1, description="Leave out at most this share of the rows, such as 0.01.")


class Split(RecipePart):
    validation: float = pydantic.Field(0.05, gt=0, lt=0.5, description="Share of the documents kept for validation.")
    test: float = pydantic.Field(0.05, gt=0, lt=0.5, description="Share of the documents kept for testing.")


class Recipe(StageRecipe):
    """Text from files, the standard library or the Hub, as documents for a tokenizer and a model."""

    stage: Literal["prepare"]
    sources: Annotated[list[Source], pydantic.Field(min_length=1)]
    split: Split = Split()
    repair: bool = pydantic.Field(True, description="Mend wrongly decoded text (mojibake) with ftfy.")
    deduplicate: bool = pydantic.Field(True, description="Keep one of several documents with the same text.")
    min_characters: int = pydantic.Field(1, ge=1, description="Drop shorter documents.")
    bad_rows: BadRows | None = pydantic.Field(None, description="By default the first unreadable row stops the run.")


def check(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Iterator[tuple[str, str]]:
    for index, source in enumerate(recipe.sources):
        if source.files is not None:
            try:
                sources.files_of(source)
            except HfkitError as error:
                yield f"sources.{index}.files", str(error)


def external(recipe: Recipe) -> dict[str, Any]:
    """The content behind the sources, as far as it lies on this machine."""
    files = [path for source in recipe.sources if source.files for path in sources.files_of(source)]
    found: dict[str, Any] = {str(path): sha256_of(path) for path in files}
    if any(source.builtin for source in recipe.sources):
        found["python-stdlib"] = stdlib.version()
    return found


def describe(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> dict[str, Any]:
    return {"sources": ", ".join(source.builtin or source.files or source.hub or "" for source in recipe.sources)}


def run(recipe: Recipe, places: dict[str, str], output: Path) -> dict[str, Any]:
    kept, dropped, seen = Counter[str](), Counter[str](), set[bytes]()
    characters, size = Counter[str](), Counter[str]()
    bad_rows: list[BadRow] = []
    with ParquetWriters(output) as writers, tqdm(unit=" documents", desc="preparing", mininterval=1) as bar:
        for row in (row for source in recipe.sources for row in sources.read(source)):
            bar.update()
            row = row._replace(origin=_printable(row.origin))
            if isinstance(row, BadRow):
                if recipe.bad_rows is None:
                    remedy = "mend the row, or allow a share of bad rows: `bad_rows: {skip: 0.01}`"
                    raise HfkitError(f"{row.origin}: {row.reason}; {remedy}")
                bad_rows.append(row)
                continue
            text = clean(row.text, recipe.repair)
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if not text.strip():
                dropped["empty"] += 1
            elif len(text) < recipe.min_characters:
                dropped["too short"] += 1
            elif recipe.deduplicate and key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                split = split_of(key, recipe.split)
                writers.write(split, Document(text, row.origin))
                kept[split] += 1
                characters[split] += len(text)
                size[split] += len(text.encode())

    dropped["bad row"] = len(bad_rows)
    _check_bad_rows(bad_rows, kept.total() + dropped.total(), recipe.bad_rows)
    for split in SPLITS:
        if not kept[split]:
            raise HfkitError(
                f"{split}: no documents ({kept.total()} in all); give more documents"
                + (", or cut them smaller with `document: passage`" if kept.total() else "")
            )
    metrics: dict[str, Any] = {
        "documents": kept.total(),
        "bytes": size.total(),
        "splits": {
            split: {"documents": kept[split], "bytes": size[split], "characters": characters[split]}
            for split in SPLITS
        },
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "bad_rows": [_printable(f"{row.origin}: {row.reason}") for row in bad_rows[:SHOWN_BAD_ROWS]],
    }
    for split in SPLITS:
        say(f"  {split:<10} {kept[split]:>9,} documents  {size[split] / 1e6:9.2f} MB")
    say("  dropped    " + (", ".join(f"{dropped[reason]:,} {reason}" for reason in metrics["dropped"]) or "nothing"))
    return metrics


def _printable(text: str) -> str:
    """File names and keys may hold what is not Unicode."""
    return text.encode(errors="backslashreplace").decode()


def clean(text: str, repair: bool) -> str:
    """Unicode NFC, with text that was decoded wrongly mended. ASCII has nothing to mend and is passed as it is."""
    if text.isascii():
        return text
    if repair:
        import ftfy

        # Only the encoding is mended: quotes, ligatures and widths are the author's.
        text = ftfy.fix_encoding(text)
    return unicodedata.normalize("NFC", text)


def split_of(key: bytes, split: Split) -> str:
    """The split of a document, decided by its own hash: it stays where it is when the data grows."""
    share = int.from_bytes(key[:8], "big") / 2**64
    if share < split.test:
        return "test"
    return "validation" if share < split.test + split.validation else "train"


def _check_bad_rows(bad_rows: list[BadRow], total: int, allowed: BadRows | None) -> None:
    if allowed is None or len(bad_rows) <= allowed.skip * total:
        return
    shown = "\n".join(f"  {row.origin}: {row.reason}" for row in bad_rows[:SHOWN_BAD_ROWS])
    raise HfkitError(
        f"bad_rows.skip={allowed.skip}: {len(bad_rows)} of {total} rows are bad, more than that share; "
        f"mend them or raise it:\n{shown}"
    )


class ParquetWriters:
    """One Parquet file a split, written in batches so that memory does not grow with the data."""

    BATCH_BYTES = 32 << 20

    def __init__(self, folder: Path):
        import pyarrow
        import pyarrow.parquet

        self.pyarrow = pyarrow
        self.schema = pyarrow.schema([("text", pyarrow.large_string()), ("source", pyarrow.string())])
        self.files = {
            split: pyarrow.parquet.ParquetWriter(folder / f"{split}.parquet", self.schema, compression="zstd")
            for split in SPLITS
        }
        self.rows: dict[str, list[Document]] = {split: [] for split in SPLITS}
        self.waiting = Counter[str]()

    def write(self, split: str, document: Document) -> None:
        self.rows[split].append(document)
        self.waiting[split] += len(document.text)
        if self.waiting[split] >= self.BATCH_BYTES:
            self._flush(split)

    def _flush(self, split: str) -> None:
        if self.rows[split]:
            columns = [list(column) for column in zip(*self.rows[split], strict=True)]
            self.files[split].write_table(self.pyarrow.table(columns, schema=self.schema))
        self.rows[split], self.waiting[split] = [], 0

    def __enter__(self) -> "ParquetWriters":
        return self

    def __exit__(self, *error: object) -> None:
        for split, file in self.files.items():
            if error[0] is None:
                self._flush(split)
            file.close()
