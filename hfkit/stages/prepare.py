"""Rows from anywhere to three Parquet files: checked, cleaned, each once, split by their own hash."""

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts.manifest import Json, Metrics, sha256_of
from hfkit.data.cleaning import Cleaning, CleanSlice, printable
from hfkit.data.columns import BadRow, Columns, Kind
from hfkit.data.corpus import SPLITS
from hfkit.data.parquet import ParquetWriters
from hfkit.data.sources import reading, stdlib
from hfkit.data.sources.reading import Slice, Source
from hfkit.data.workers import Workers
from hfkit.errors import HfkitError, did_you_mean
from hfkit.recipe.fields import Push, RecipePart, ResolvedInputs, StageRecipe
from hfkit.runtime.bars import Bar
from hfkit.runtime.cores import usable_cores
from hfkit.runtime.distributed import say

SHOWN_BAD_ROWS = 20
ALONE_CHARACTERS = 16_000_000  # so many are cleaned in this process; others are started for what is beyond


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

    MAKES: ClassVar[str] = "data set"
    DISTRIBUTED: ClassVar[bool] = False
    SUMMARY: ClassVar[str] = "Text prepared for training: cleaned, each row once, split by the rows' own hashes."

    stage: Literal["prepare"]
    sources: Annotated[list[Source], pydantic.Field(min_length=1)]
    columns: dict[str, Kind] = pydantic.Field(
        {"text": "text"},
        min_length=1,
        description="The columns of a row, each text, texts (a list), label (a class), labels (a list of classes), "
        "messages (a chat) or tools (what the assistant of a chat may call, as JSON schemas).",
    )
    labels: list[str] | None = pydantic.Field(
        None, min_length=1, description="Names of the classes: others are refused, numbers are places in this list."
    )
    split: Split = Split()
    repair: bool = pydantic.Field(True, description="Repair mojibake (wrongly decoded text) with ftfy.")
    deduplicate: bool | list[str] = pydantic.Field(
        True, description="Keep one of several rows that are the same, or the same in the columns named here."
    )
    min_characters: int = pydantic.Field(1, ge=1, description="Drop rows with less text.")
    bad_rows: BadRows | None = pydantic.Field(None, description="By default the first unreadable row stops the run.")
    push: Push | None = None

    def external_inputs(self) -> Json:
        """Return the content behind the sources, as far as it lies on this machine."""
        files = [path for source in self.sources if source.files for path in reading.files_of(source)]
        digests: dict[str, Any] = {str(path): sha256_of(path) for path in files}
        if any(source.builtin for source in self.sources):
            digests["python-stdlib"] = stdlib.version()
        return digests


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    for index, source in enumerate(recipe.sources):
        if source.files is not None:
            try:
                reading.files_of(source)
            except HfkitError as error:
                yield f"sources.{index}.files", str(error)
        for name in source.columns:
            if name not in recipe.columns:
                yield f"sources.{index}.columns.{name}", f"is not in `columns`, {did_you_mean(name, recipe.columns)}"
        if source.into in recipe.split.model_fields_set:
            yield f"split.{source.into}", f"sources.{index} goes into {source.into}, which takes no others; delete one"
    columns = [("split.by", recipe.split.by)] if recipe.split.by else []
    columns += [("deduplicate", name) for name in recipe.deduplicate] if isinstance(recipe.deduplicate, list) else []
    for key, name in columns:
        if name not in recipe.columns:
            yield key, f"{name}: is not in `columns`, {did_you_mean(name, recipe.columns)}"
    if recipe.labels is not None and not {"label", "labels"} & {*recipe.columns.values()}:
        yield "labels", "no column is a label; write `columns: {<name>: label}`, or `labels` for lists of them"


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    counts, dropped, keys = Counter[str](), Counter[str](), set[bytes]()
    characters, size, left_out = Counter[str](), Counter[str](), Counter[str]()
    bad_rows: list[BadRow] = []
    with (
        ParquetWriters(output, recipe.columns) as writers,
        Bar(unit=" rows", desc="preparing", leave=True) as bar,
        contextlib.closing(_clean_slices(recipe)) as slices,
    ):
        for piece in slices:
            bar.update(len(piece.rows))
            left_out.update(piece.left_out)
            for row in piece.rows:
                if isinstance(row, BadRow):
                    _refuse_or_keep(row, bad_rows, recipe.bad_rows)
                elif isinstance(row, str):
                    dropped[row] += 1
                elif recipe.deduplicate and row.key in keys:
                    dropped["duplicate"] += 1
                else:
                    keys.add(row.key)
                    for _ in range(row.times):
                        writers.write(row.split, row.values, row.origin, row.characters)
                    counts[row.split] += row.times
                    characters[row.split] += row.times * row.characters
                    size[row.split] += row.times * row.bytes

    dropped["bad row"] = sum(row.lines for row in bad_rows)
    _check_bad_rows(bad_rows, counts.total() + dropped.total(), recipe.bad_rows)
    for split in SPLITS:
        if not counts[split]:
            drops = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count)
            raise HfkitError(
                f"{split}: no rows ({counts.total()} in all{f'; dropped: {drops}' if drops else ''}); give more data"
                + (", or cut them smaller with `document: passage`" if counts.total() else "")
            )
    metrics: dict[str, Any] = {
        "rows": counts.total(),
        "bytes": size.total(),
        "splits": {
            split: {"rows": counts[split], "bytes": size[split], "characters": characters[split]} for split in SPLITS
        },
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "bad_rows": [f"{row.origin}: {row.reason}" for row in bad_rows[:SHOWN_BAD_ROWS]],
    }
    for split in SPLITS:
        say(f"  {split:<10} {counts[split]:>9,} rows  {size[split] / 1e6:9.2f} MB")
    if left_out:
        metrics["left_out"] = {printable(name): count for name, count in left_out.items()}
        fields = ", ".join(f"{printable(name)} ({count:,})" for name, count in left_out.most_common())
        say(f"  WARNING: messages hold fields that are not kept: {fields}")
    say("  dropped    " + (", ".join(f"{dropped[reason]:,} {reason}" for reason in metrics["dropped"]) or "nothing"))
    return metrics


def cleaning_of(recipe: Recipe) -> Cleaning:
    return Cleaning(
        recipe.sources,
        Columns(recipe.columns, recipe.labels),
        key_columns=recipe.deduplicate if isinstance(recipe.deduplicate, list) else None,
        group_column=recipe.split.by,
        shares=(recipe.split.test, recipe.split.validation),
        repair=recipe.repair,
        min_characters=recipe.min_characters,
    )


def _clean_slices(recipe: Recipe) -> Generator[CleanSlice, None, None]:
    """Yield the rows of all sources, clean, in the same order on one process as on several."""
    cleaning, size = cleaning_of(recipe), 0
    slices = _slices(recipe, cleaning.columns)
    for piece in slices:
        yield (cleaned := cleaning(piece))
        size += cleaned.size
        if size >= ALONE_CHARACTERS and cleaning.columns.is_settled and usable_cores() > 1:
            with Workers(cleaning, usable_cores()) as workers:
                yield from workers.map(slices)


def _slices(recipe: Recipe, columns: Columns) -> Iterator[Slice]:
    # Rows of test and validation come first, so that it is training that loses the duplicates.
    order = {"test": 0, "validation": 1}
    for index, source in sorted(enumerate(recipe.sources), key=lambda pair: order.get(pair[1].into or "", 2)):
        yield from reading.slices(index, source, columns)


def _refuse_or_keep(row: BadRow, bad_rows: list[BadRow], allowed: BadRows | None) -> None:
    if allowed is None:
        remedy = "fix the row, or tolerate a share of bad rows: `bad_rows: {skip: 0.01}`"
        raise HfkitError(f"{row.origin}: {row.reason}; {remedy}")
    bad_rows.append(row)


def _check_bad_rows(bad_rows: list[BadRow], total: int, allowed: BadRows | None) -> None:
    lines = sum(row.lines for row in bad_rows)
    if allowed is None or lines <= allowed.skip * total:
        return
    shown = "\n".join(f"  {row.origin}: {row.reason}" for row in bad_rows[:SHOWN_BAD_ROWS])
    raise HfkitError(
        f"bad_rows.skip={allowed.skip}: {lines} of {total} rows are bad, more than that share; "
        f"correct them or raise it:\n{shown}"
    )
