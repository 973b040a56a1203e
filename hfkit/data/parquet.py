"""The three Parquet files of a data set, written row by row."""

from collections import Counter
from pathlib import Path
from typing import Any

from hfkit.data.columns import FIELDS, Kind
from hfkit.data.corpus import SPLITS


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
            "labels": pyarrow.list_(pyarrow.string()),
            "messages": pyarrow.list_(message),
            "tools": pyarrow.large_string(),
        }
        self.schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()] + [("source", "string")])
        self.files = {
            split: pyarrow.parquet.ParquetWriter(folder / f"{split}.parquet", self.schema, compression="zstd")
            for split in SPLITS
        }
        self.columns = {split: self._empty() for split in SPLITS}
        self.waiting = Counter[str]()

    def write(self, split: str, values: list[Any], origin: str, characters: int) -> None:
        for column, value in zip(self.columns[split], (*values, origin), strict=True):
            column.append(value)
        self.waiting[split] += characters
        if self.waiting[split] >= self.BATCH_BYTES:
            self._flush(split)

    def _flush(self, split: str) -> None:
        columns = self.columns[split]
        if columns[0]:
            arrays = []
            for column, field in zip(columns, self.schema, strict=True):
                arrays.append(self.pyarrow.array(column, field.type))
                column.clear()  # else each text would be held twice
            self.files[split].write_table(self.pyarrow.Table.from_arrays(arrays, schema=self.schema))
        self.waiting[split] = 0

    def _empty(self) -> list[list[Any]]:
        return [[] for _ in self.schema]

    def __enter__(self) -> "ParquetWriters":
        return self

    def __exit__(self, *error: object) -> None:
        for split, file in self.files.items():
            if error[0] is None:
                self._flush(split)
            file.close()
