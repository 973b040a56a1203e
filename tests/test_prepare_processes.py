"""Preparing by several processes: the same files, the same numbers and the same errors as by one."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hfkit.artifacts import manifest
from hfkit.data.sources import files, reading
from hfkit.data.workers import Workers
from hfkit.errors import HfkitError
from hfkit.stages import prepare

PROCESSES = (1, 2, 7)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes were started. Slices are so small that every one has some, also of what a test writes."""
    counts: list[int] = []

    class Counted(Workers[Any, Any]):
        def __enter__(self) -> "Counted":
            counts.append(self.count)
            super().__enter__()
            return self

    monkeypatch.setattr(prepare, "Workers", Counted)
    monkeypatch.setattr(files, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(reading, "SLICE_ROWS", 20)
    monkeypatch.setattr(prepare, "ALONE_CHARACTERS", 3000)
    return counts


def outcome(monkeypatch: pytest.MonkeyPatch, folder: Path, processes: int, recipe: dict[str, Any]) -> Any:
    """The digests of the files and the metrics, or the error."""
    monkeypatch.setattr(prepare, "usable_cores", lambda: processes)
    folder.mkdir()
    try:
        metrics = prepare.run(prepare.Recipe.model_validate({"stage": "prepare", **recipe}), {}, folder)
    except HfkitError as error:
        return error.problems
    return manifest.describe_files(folder), metrics


def write_rows(path: Path, count: int, seed: int) -> str:
    """JSON lines with duplicates, mojibake and rows that are dropped."""
    rng = random.Random(seed)
    texts = [
        "schÃ¶n",
        "schön",
        "",
        "ok",
        "“quoted” text that is long enough",
        *(f"text {n} of many" for n in range(900)),
    ]
    rows = ({"text": rng.choice(texts), "label": rng.choice("ab")} for _ in range(count))
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def test_any_number_of_processes_keeps_the_same_rows_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[int]
) -> None:
    recipe = {
        "sources": [
            {"files": write_rows(tmp_path / "train.jsonl", 1500, 0), "weight": 1.5},
            {"files": write_rows(tmp_path / "limited.jsonl.gz", 300, 1), "limit": 101},
            {"files": write_rows(tmp_path / "more.jsonl.gz", 700, 2)},
            {"files": write_rows(tmp_path / "own.jsonl", 400, 3), "into": "test"},
        ],
        "columns": {"text": "text", "label": "label"},
        "deduplicate": ["text"],
        "min_characters": 4,
        "split": {"validation": 0.2},
    }
    alone, *others = [outcome(monkeypatch, tmp_path / f"by{count}", count, recipe) for count in PROCESSES]
    digests, metrics = alone
    assert others == [alone, alone] and started == [2, 7]
    assert len(digests) == 3 and metrics["dropped"].keys() == {"duplicate", "empty", "too short"}


@pytest.mark.parametrize("skip", [None, 0.5, 0.001])
def test_bad_rows_are_counted_and_named_as_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: float | None
) -> None:
    """Labels take the type of the first that there is, which only rows before them can tell."""
    labels = [7, 8, "9", 7] * 200
    lines = [json.dumps({"text": f"text {n}", "label": label}) for n, label in enumerate(labels)]
    lines[300], lines[301] = '{"text": nope}', json.dumps({"text": "\ud83d", "label": 7})
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe: dict[str, Any] = {
        "sources": [{"files": str(tmp_path / "a.jsonl")}],
        "columns": {"text": "text", "label": "label"},
        "bad_rows": None if skip is None else {"skip": skip},
    }
    alone, *others = [outcome(monkeypatch, tmp_path / f"by{count}", count, recipe) for count in PROCESSES]
    assert others == [alone, alone]
    if skip == 0.5:
        assert alone[1]["dropped"] == {"bad row": 202} and alone[1]["bad_rows"][0].startswith(
            f"{tmp_path}/a.jsonl:3: "
        )
    else:
        told = "must be a whole number as in the rows before" if skip is None else "202 of 800 rows are bad"
        assert told in alone[0]


def test_a_file_that_ends_too_early_is_told_after_the_rows_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write_rows(tmp_path / "a.jsonl.gz", 3000, 0))
    path.write_bytes(path.read_bytes()[:-9])
    told = [
        outcome(monkeypatch, tmp_path / f"by{count}", count, {"sources": [{"files": str(path)}]})
        for count in PROCESSES
    ]
    assert told[0] == told[1] == told[2] and "a.jsonl.gz: cannot be read" in told[0][0]


def square(number: int) -> int:
    if number == 13:
        raise HfkitError("13: brings bad luck", "take another")
    print("what a library prints comes between no answers")
    return number * number


def test_results_come_in_order_and_a_failure_after_those_before_it() -> None:
    with Workers(square, 3) as workers:
        assert list(workers.map(range(10))) == [number * number for number in range(10)]
    found = []
    with pytest.raises(HfkitError, match="brings bad luck") as caught, Workers(square, 3) as workers:
        found += workers.map(range(5, 13))
        for result in workers.map(range(11, 30)):
            found.append(result)
    assert found == [number * number for number in [*range(5, 13), 11, 12]] and len(caught.value.problems) == 2


def test_items_are_taken_as_they_are_needed_and_their_error_comes_last() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number
        raise HfkitError("no more")

    with Workers(square, 2) as workers:
        results = workers.map(items())
        assert next(results) == 0 and len(taken) <= 5, "no more than wait for two processes"
        with pytest.raises(HfkitError, match="no more"):
            assert [*results] == []
    assert len(taken) == 9


def fall_or_work(item: tuple[bool, bytes]) -> None:
    if item[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_process_that_the_system_ends_is_told_at_once() -> None:
    """While the other is at work, and more items wait than a pipe holds."""
    items = [(number == 0, b"x" * 1_000_000) for number in range(9)]
    begun = time.monotonic()
    with (
        pytest.raises(HfkitError, match=r"ended with exit code -9, .*; free some"),
        Workers(fall_or_work, 2) as workers,
    ):
        list(workers.map(items))
    assert time.monotonic() - begun < 40, "without waiting for the other"


ORPHANS = """
import sys, time
from hfkit.data.workers import Workers
with Workers(time.sleep, 2) as workers:
    print(*(process.pid for process in workers.processes), flush=True)
    time.sleep(60)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems list their processes elsewhere")
def test_processes_end_with_the_one_that_started_them() -> None:
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) == 2 and not any(map(runs, children))
