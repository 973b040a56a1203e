"""Readers of files: whatever the bytes are, there come rows, counted bad rows, or one error."""

import contextlib
import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfkit.data import corpus
from hfkit.data.columns import BadRow, Columns, ReadRow
from hfkit.data.guess import guess
from hfkit.data.sources.reading import Source, files_of, read
from hfkit.data.tasks.text import Text
from hfkit.errors import HfkitError
from hfkit.stages import prepare

FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Bytes of any kind, and such as the format would have in the main.
TEXTS = st.lists(st.sampled_from(['"', ",", "\n", "\r", "a", "text", "{", "}", "[", ":", "\\ud83d", "\0", "é", " "]))
CONTENTS = st.one_of(st.binary(max_size=200), TEXTS.map(lambda parts: "".join(parts).encode()))


def rows_of(path: Path, kinds: dict[str, Any] | None = None) -> list[ReadRow | BadRow]:
    return list(read(Source(files=str(path)), Columns(kinds or {"text": "text"})))


@pytest.mark.parametrize("suffix", [".txt", ".py", ".jsonl", ".csv", ".parquet", ".txt.gz", ".jsonl.zst", ".csv.gz"])
def test_no_bytes_break_a_reader(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"

    @FUZZ
    @given(content=CONTENTS, is_header_right=st.booleans(), is_compressed=st.booleans())
    def fuzz(content: bytes, is_header_right: bool, is_compressed: bool) -> None:
        content = b"text\n" + content if is_header_right and ".csv" in suffix else content
        path.write_bytes(gzip.compress(content) if is_compressed and suffix.endswith(".gz") else content)
        try:
            found = rows_of(path)
        except HfkitError as error:
            assert str(path) in str(error) and "; " in str(error), "it names the file and a remedy"
        else:
            for row in found:
                assert isinstance(row, BadRow) or row.values["text"].encode() is not None
                assert row.origin.startswith(str(path)) and (
                    isinstance(row, ReadRow) or (row.reason and row.lines > 0)
                )
        try:
            guess(str(path), Text, {})
        except HfkitError as error:
            assert str(path) in str(error)

    fuzz()


@pytest.mark.parametrize("suffix", [".parquet", ".parquet.gz", ".txt.gz", ".jsonl.zst"])
def test_no_damage_breaks_a_reader(tmp_path: Path, suffix: str) -> None:
    """Files that were right, with some bytes of them changed, cut out or put in."""
    path = tmp_path / f"a{suffix}"
    texts = [f"text {number}" for number in range(9)]
    if ".parquet" in suffix:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [*range(9)]}), file, compression="none")
        right = file.getvalue()
    else:
        right = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if suffix.endswith(".gz"):
        right = gzip.compress(right)
    if suffix.endswith(".zst"):
        right = zstandard.compress(right)

    @FUZZ
    @given(start=st.integers(0, len(right)), length=st.integers(0, 8), patch=st.binary(max_size=8))
    def fuzz(start: int, length: int, patch: bytes) -> None:
        path.write_bytes(right[:start] + patch + right[start + length :])
        try:
            found = rows_of(path)
        except HfkitError as error:
            assert str(path) in str(error) and "; " in str(error), "it names the file and a remedy"
        else:
            for row in found:
                assert row.origin.startswith(str(path))
                assert row.reason if isinstance(row, BadRow) else row.values["text"].encode() is not None
        with contextlib.suppress(HfkitError):
            guess(str(path), Text, {})
            if ".parquet" in suffix:
                (tmp_path / "train.parquet").write_bytes(path.read_bytes())
                list(corpus.rows(str(tmp_path), "train"))

    fuzz()


def test_text_in_parquet_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    values = pyarrow.array([b"fine", b"x\xe9", b"also"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    first, bad, last = rows_of(path)
    assert isinstance(first, ReadRow) and isinstance(last, ReadRow) and last.origin == f"{path}:2"
    assert isinstance(bad, BadRow) and bad.origin == f"{path}:1" and "codec can't decode byte 0xe9" in bad.reason
    with pytest.raises(HfkitError, match=r"train\.parquet: cannot be read: .*0xe9.*; prepare the data again"):
        list(corpus.rows(str(tmp_path), "train"))


def test_what_cannot_be_reached_in_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    try:
        (tmp_path / ".#a.txt").symlink_to("user@host.17")  # as an editor leaves it
        (tmp_path / "picture.png").symlink_to("nowhere")
        assert files_of(Source(files=str(tmp_path))) == [tmp_path / "a.txt"]
        (tmp_path / "b.txt").symlink_to("nowhere")
    except OSError:
        pytest.skip("no links here")
    with pytest.raises(HfkitError, match=r"b\.txt: is a link to nowhere, which is not there; restore it or delete it"):
        files_of(Source(files=str(tmp_path)))
    (tmp_path / "b.txt").unlink()
    (tmp_path / "closed").mkdir(mode=0)
    try:
        if not os.access(tmp_path / "closed", os.R_OK):  # root may read all
            with pytest.raises(HfkitError, match="closed: cannot be listed: Permission denied; allow it"):
                files_of(Source(files=str(tmp_path)))
    finally:
        (tmp_path / "closed").chmod(0o700)


@FUZZ
@given(rows=st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), max_size=8))
def test_csv_gives_back_what_was_written(tmp_path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["text", "other"], *rows])
    path = tmp_path / "a.csv"
    try:
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    except UnicodeEncodeError:
        return
    assert [row.values["text"] for row in rows_of(path) if isinstance(row, ReadRow)] == [row[0] for row in rows]


def test_the_lines_that_a_bad_row_swallowed_count_and_the_first_is_named(tmp_path: Path) -> None:
    lines = [f"row {number}" for number in range(300)]
    lines[100], lines[140] = '"row 100', 'row 140" and more'
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "\n".join(lines) + "\n", encoding="utf-8")
    bad = [row for row in rows_of(path) if isinstance(row, BadRow)]
    assert [(row.origin, row.lines) for row in bad] == [(f"{path}:102", 41)]
    values = {"stage": "prepare", "sources": [{"files": str(path)}], "split": {"validation": 0.2, "test": 0.2}}
    for share, is_refused in ((0.1, True), (0.2, False)):
        recipe = prepare.Recipe.model_validate({**values, "bad_rows": {"skip": share}})
        if is_refused:
            with pytest.raises(HfkitError, match="41 of 300 rows are bad, more than that share"):
                prepare.run(recipe, {}, tmp_path)
        else:
            assert prepare.run(recipe, {}, tmp_path)["dropped"] == {"bad row": 41}


def test_a_quote_that_is_never_closed_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "fine\n" * 9 + '"open\n' + "lost\n" * 90, encoding="utf-8")
    values = {"stage": "prepare", "sources": [{"files": str(path)}], "bad_rows": {"skip": 0.9}}
    with pytest.raises(HfkitError, match=r"a\.csv:11: not CSV: a quote that is opened in this row is never closed"):
        prepare.run(prepare.Recipe.model_validate(values), {}, tmp_path)


@pytest.mark.parametrize("kind, value", [("text", "\ud83d"), ("label", "\ud83d"), ("texts", ["a", "\ud83d"])])
def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path, kind: str, value: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"x": "a" if kind != "texts" else ["a"]}) + "\n" + json.dumps({"x": value}) + "\n")
    good, bad = rows_of(path, {"x": kind})
    assert isinstance(good, ReadRow) and isinstance(bad, BadRow)
    assert bad.origin == f"{path}:2" and "is not UTF-8" in bad.reason


def test_links_are_followed_once_and_circles_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far):
        folder.mkdir()
        for name in "ab":
            (folder / f"{name}.txt").write_text(f"{folder.name} {name}", encoding="utf-8")
    try:
        (near / "link").symlink_to(far)
        (far / "back").symlink_to(near)
        (near / "again.txt").symlink_to(near / "a.txt")
    except OSError:
        pytest.skip("no links here")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (str(near), f"{near}/**/*.txt", "~/near"):
        found = files_of(Source(files=place))
        assert sorted(path.read_text(encoding="utf-8") for path in found) == ["far a", "far b", "near a", "near b"]
        assert found == sorted(found) and near / "a.txt" in found, "by its shortest name"
