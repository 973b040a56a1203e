"""Data that is not as it should be: refused by file, line and column, or counted and listed where that is allowed."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.faults.conftest import Ledger
from tests.faults.world import HFKIT, World, must_tell, two_at_a_time

pytestmark = pytest.mark.faults
NewWorld = Callable[..., World]
PREPARE = [*HFKIT[:-1], "recipes/data.yaml"]
ROW = '{"text": "fine row"}\n'
BOM = b"\xef\xbb\xbf"
REMEDY = "fix the row, or tolerate a share of bad rows: `bad_rows: {skip: 0.01}`"
BAD_ROWS = {
    "bad JSONL row": ("bad.jsonl", ROW + '{"text": nope}\n', "bad.jsonl:2: not a JSON object: "),
    "no object": ("bad.jsonl", ROW + "[1, 2]\n", "bad.jsonl:2: not a JSON object but list"),
    "truncated last line": ("bad.jsonl", ROW + '{"text": "hal', "bad.jsonl:2: not a JSON object: "),
    "non-UTF-8 row": ("bad.jsonl", ROW.encode() + b'{"text": "\xe9"}\n', "bad.jsonl:2: byte 0xe9 is not UTF-8"),
    "non-UTF-8 line": ("bad.txt", b"fine row\nnot \xe9 fine\n", "bad.txt:2: byte 0xe9 is not UTF-8"),
    "non-UTF-8 field": ("bad.csv", b"n,text\n1,fine row\n2,\xe9\n", 'bad.csv:3: column "text": is not UTF-8'),
    "missing column": (
        "bad.jsonl",
        ROW + '{"txt": "b"}\n',
        'bad.jsonl:2: column "text": is missing, did you mean "txt"',
    ),
    "mixed types": ("bad.jsonl", ROW + '{"text": 3}\n', 'bad.jsonl:2: column "text": must be text, got 3'),
    "nested type": ("bad.jsonl", ROW + '{"text": ["a"]}\n', "bad.jsonl:2: column \"text\": must be text, got ['a']"),
    "null text": ("bad.jsonl", ROW + '{"text": null}\n', 'bad.jsonl:2: column "text": must be text, got None'),
    "short CSV row": ("bad.csv", "n,text\n1,fine row\n2\n", 'bad.csv:3: column "text": must be text, got None'),
}


def with_file(world: World, name: str, content: str | bytes, *keys: str, alone: bool = False) -> World:
    """The data recipe reads one more file, or that file alone."""
    (world.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    sources = [] if alone else ["  - files: texts.txt", "    document: line"]
    sources += [f"  - files: {name}", *(["    document: line"] if name.endswith(".txt") else [])]
    lines = ["stage: prepare", "sources:", *sources, "split: {validation: 0.1, test: 0.1}", *keys]
    (world.folder / "recipes/data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    world.settings, world.out = [], world.folder / "runs/bad"
    return world


def refused(world: World, *told: str) -> None:
    """Exit code 2 and an error that says what and where; nothing is left behind that looks made."""
    process = world.start(command=PREPARE)
    code, text = process.wait(), process.text
    must_tell(code == 2, f"exit code {code} instead of 2:\n{text}")
    for words in ("error: ", *told):
        must_tell(words in text, f"{words!r} is not in:\n{text}")
    must_tell("Traceback" not in text, text)
    assert not world.out.exists() and not list(world.out.parent.glob(".bad.*partial"))


def metrics_of(world: World) -> dict[str, object]:
    world.run(command=PREPARE)
    return json.loads((world.out / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.quick
def test_a_bad_row_is_refused_or_counted(ledger: Ledger, new: NewWorld) -> None:
    def check(kind: str) -> None:
        name, content, told = BAD_ROWS[kind]
        with ledger.faults(f"bad data: {kind}"):
            refused(with_file(new(), name, content), told, REMEDY)
        with ledger.faults(f"bad data, skipped: {kind}"):
            metrics = metrics_of(with_file(new(), name, content, "bad_rows: {skip: 0.5}"))
            must_tell(metrics["dropped"] == {"bad row": 1}, f"not counted: {metrics}")
            assert len(metrics["bad_rows"]) == 1 and metrics["bad_rows"][0].startswith(told), metrics["bad_rows"]
            assert metrics["rows"] == 401, "the fine row of the same file is missing"

    two_at_a_time(BAD_ROWS, check)


@pytest.mark.quick
def test_a_byte_order_mark_is_read(ledger: Ledger, new: NewWorld) -> None:
    def check(name: str) -> None:
        content = {".jsonl": ROW, ".csv": "text\nfine row\n", ".txt": "fine row\n"}[Path(name).suffix]
        with ledger.faults("bad data: BOM"):
            world = with_file(new(), name, BOM + content.encode())
            metrics = metrics_of(world)
            assert metrics["rows"] == 401 and metrics["dropped"] == {}, metrics
            tables = [pyarrow.parquet.read_table(path) for path in world.out.glob("*.parquet")]
            assert "fine row" in [text for table in tables for text in table["text"].to_pylist()]

    two_at_a_time(["bad.jsonl", "bad.csv", "bad.txt"], check)


@pytest.mark.quick
def test_a_file_without_documents_is_refused(ledger: Ledger, new: NewWorld) -> None:
    cases = {
        "empty file": ("bad.txt", "", [], "no rows (0 in all); give more data"),
        "empty JSONL": ("bad.jsonl", "", [], "no rows (0 in all); give more data"),
        "empty after filtering": ("bad.txt", "a\nb\n\n", ["min_characters: 100"], "no rows (0 in all; dropped: "),
        "only blank": ("bad.txt", " \n\n\t\n", [], "no rows (0 in all; dropped: "),
        "truncated CSV": ("bad.csv", 'n,text\n1,fine row\n2,"hal', [], "bad.csv:3: not CSV: a quote that is opened"),
        "CSV without the column": ("bad.csv", "n,txt\n1,a\n", [], 'bad.csv: has no column "text", did you mean "txt"'),
        "no Parquet": ("bad.parquet", "text" * 9, [], "bad.parquet: not a Parquet file"),
        "no gzip": ("bad.jsonl.gz", ROW, [], "bad.jsonl.gz: cannot be read: Not a gzipped file"),
    }

    def check(kind: str) -> None:
        name, content, keys, told = cases[kind]
        with ledger.faults(f"bad data: {kind}"):
            refused(with_file(new(), name, content, *keys, alone=True), told)

    two_at_a_time(cases, check)


@pytest.mark.quick
def test_more_bad_rows_than_allowed_are_refused(ledger: Ledger, new: NewWorld) -> None:
    with ledger.faults("bad data: more than allowed"):
        content = ROW + '{"text": null}\n' * 3
        told = [f'bad.jsonl:{line}: column "text": must be text, got None' for line in (2, 3, 4)]
        refused(with_file(new(), "bad.jsonl", content, "bad_rows: {skip: 0.005}"), "3 of 404 rows are bad", *told)
