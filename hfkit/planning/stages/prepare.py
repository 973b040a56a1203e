"""What `prepare` costs."""

from hfkit.data.columns import ReadRow
from hfkit.data.parquet import ParquetWriters
from hfkit.planning.work import Chore, Known, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.prepare import Recipe, cleaning_of

CLEANED_A_SECOND, PACKED = 6e7, 0.3  # of a plan: bytes cleaned and written, and their share on the disk


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    return {"sources": ", ".join(source.builtin or source.files or source.hub or "" for source in recipe.sources)}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.planning.sources import Look

    cleaning = cleaning_of(recipe)

    def found(row: ReadRow) -> tuple[str, bytes] | None:
        if cleaning.reason_to_drop(row.values):
            return None
        key = cleaning.key(row.values)
        return cleaning.split_of(row.values, row.group, key), key

    look = Look(cleaning.columns, found, None if recipe.split.by else cleaning.split_of_group)
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
