"""How much a data set will hold, by a look at its sources: small ones are read whole, of others a part."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfkit.data.columns import BadRow, Columns
from hfkit.data.corpus import SPLITS, Row
from hfkit.data.sources import stdlib
from hfkit.data.sources.reading import Source, files_of, read
from hfkit.planning.work import Texts

LOOK_BYTES, LOOK_SECONDS = 16_000_000, 2.0  # at most so much of a source is read
SAMPLE_BYTES, SAMPLE_ROWS = 2_000_000, 400
ONE_IN = 4  # modules of the training split, of a source that has to be parsed
MARKS = {
    "python-functions": b'"""',
    "python-packages": b"def ",
}  # of which a module has the more, the more rows it gives
UNPACKED = 4.0  # bytes of text in one of a compressed file

SplitOf = Callable[[Any], tuple[str, bytes] | None]  # of a row its split and its key; None where it is dropped


class Look:
    """Counts the rows of several sources.

    Args:
        split_of: of a row.
        split_of_module: of a module of the standard library; None where rows are split by something else.
    """

    def __init__(self, columns: Columns, split_of: SplitOf, split_of_module: Callable[[str], str] | None):
        self.columns, self.split_of, self.split_of_module = columns, split_of, split_of_module
        self.rows, self.bytes = Counter[str](), Counter[str]()
        self.sample: list[dict[str, Any]] = []
        self.seen: set[bytes] = set()
        self.seconds = 0.0  # that reading all of it takes
        self.is_exact = True

    def at(self, source: Source) -> None:
        """Look at a source that lies on this machine."""
        wanted, factor, parsed, listing = None, 1.0, 1.0, 0.0
        if source.builtin in MARKS and self.split_of_module is not None:
            begun = time.process_time()
            wanted, factor, parsed = self._some_modules(source.builtin, self.split_of_module)
            listing = (time.process_time() - begun) * (2 if source.builtin == "python-packages" else 1)
        rows, sizes, taken = Counter[str](), Counter[str](), list[dict[str, Any]]()
        begun, looked, is_whole = time.process_time(), 0, True
        for row in read(source, self.columns, wanted):
            if isinstance(row, BadRow) or (found := self.split_of(row)) is None or found[1] in self.seen:
                continue
            self.seen.add(found[1])
            size = len(repr(row.values)) if row.values.keys() != {"text"} else len(row.values["text"].encode())
            split = source.into or found[0]
            rows[split], sizes[split], looked = rows[split] + 1, sizes[split] + size, looked + size
            taken.append(row.values)
            if looked > LOOK_BYTES or (source.files and time.process_time() - begun > LOOK_SECONDS):
                is_whole = False
                break
        seconds = time.process_time() - begun  # not the time of the clock, in which others work too
        whole = 1.0 if is_whole else max(_bytes_of(source) / max(looked, 1), 1.0)
        if source.limit is not None and not is_whole:
            whole = min(whole, source.limit / max(rows.total(), 1))
        self.is_exact &= is_whole and factor == 1
        for split in SPLITS:
            times = whole * (factor * source.weight if split == "train" else 1)
            self.rows[split] += round(rows[split] * times)
            self.bytes[split] += round(sizes[split] * times)
        self.seconds += listing + max(seconds - listing, 0) * whole / parsed
        self._keep(taken)

    def texts(self) -> Texts:
        return Texts(dict(self.rows), dict(self.bytes), self.sample, self.is_exact)

    def _some_modules(
        self, builtin: str, split_of: Callable[[str], str]
    ) -> tuple[Callable[[str], bool], float, float]:
        """All modules of validation and test, which are few, and one in `ONE_IN` of the others; what the functions of
        those are to be multiplied by; and the share of all bytes that is looked at."""
        sizes, marks = {}, {}
        for name, content in stdlib.documents():
            is_in = "/" in name or builtin == "python-functions"
            sizes[name], marks[name] = len(content), content.count(MARKS[builtin]) if is_in else 0
        in_train = [name for name in sizes if split_of(name) == "train"]
        chosen = set(in_train[::ONE_IN])
        wanted = chosen | (sizes.keys() - set(in_train))
        factor = sum(marks[name] for name in in_train) / max(sum(marks[name] for name in chosen), 1)
        share = sum(sizes[name] for name in wanted) / max(sum(sizes.values()), 1)
        return wanted.__contains__, factor, share

    def _keep(self, rows: list[Row]) -> None:
        """Some of the rows, from all over the source."""
        size = 0
        for values in rows[:: max(len(rows) // SAMPLE_ROWS, 1)]:
            if size < SAMPLE_BYTES:
                self.sample.append(values)
                size += len(repr(values))


def _bytes_of(source: Source) -> float:
    def of(path: Path) -> float:
        return path.stat().st_size * (UNPACKED if path.suffix.lower() in (".gz", ".zst", ".parquet") else 1)

    return sum(map(of, files_of(source))) if source.files else 0.0
