"""The texts of a prepared folder, or of a data set on the Hub that has the same three splits."""

from collections.abc import Iterator
from pathlib import Path

from hfkit.errors import HfkitError, reason

SPLITS = ("train", "validation", "test")
ROWS_READ_AT_ONCE = 256


def problem_with(place: str) -> str | None:
    """Why a folder cannot serve as prepared data; None if it can. A Hub id is looked at when it is read."""
    missing = [f"{split}.parquet" for split in SPLITS if not (Path(place) / f"{split}.parquet").is_file()]
    if Path(place).is_dir() and missing:
        return f"{place}: has no {', '.join(missing)}; make it with a recipe of `stage: prepare`"
    return None


def texts(place: str, split: str) -> Iterator[str]:
    """The documents of a split, one after the other.

    Raises:
        HfkitError: if the split cannot be read or has no column `text`.
    """
    return _folder_texts(Path(place) / f"{split}.parquet") if Path(place).is_dir() else _hub_texts(place, split)


def _folder_texts(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise HfkitError(f'{path}: has no column "text"; make it with a recipe of `stage: prepare`')
        for batch in file.iter_batches(batch_size=ROWS_READ_AT_ONCE, columns=["text"]):
            if batch.column(0).null_count:
                raise HfkitError(f'{path}: column "text" has empty values; make it with a recipe of `stage: prepare`')
            yield from batch.column(0).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise HfkitError(f"{path}: cannot be read: {error}; prepare the data again") from None


def _hub_texts(place: str, split: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(place, split=split, streaming=True)
        for row in rows:
            yield str(row["text"] or "")
    except Exception as error:  # the loader raises whatever the network, the Hub or the files bring up
        raise HfkitError(
            f"{place}: split {split} with a column text cannot be loaded from the Hub: {reason(error)}; "
            f"a recipe of `stage: prepare` with `hub: {place}` makes the splits and takes any column"
        ) from None
