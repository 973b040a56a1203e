"""Rows of several columns: labels, lists, chats; what is wrong with one is told with file, line and column."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from hfkit.data import corpus
from hfkit.data.columns import BadRow, Columns, ReadRow
from hfkit.data.sources import reading, stdlib
from hfkit.data.sources.reading import Source
from hfkit.errors import HfkitError
from hfkit.stages import prepare

KINDS: dict[str, Any] = {"question": "text", "topic": "label"}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, kinds: dict[str, Any], labels: list[str] | None = None, **source: Any) -> list[ReadRow | BadRow]:
    return list(reading.read(Source(files=str(path), **source), Columns(kinds, labels)))


def prepared(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist()


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([{"question": "a", "topic": 3}], ["x", "y"], "label 3 is out of range: `labels` has 2 names"),
        ([{"question": "a", "topic": -1}], ["x", "y"], "label -1 is out of range"),
        ([{"question": "a", "topic": "sprot"}], ["sport", "art"], 'not among `labels`, did you mean "sport"?'),
        ([{"question": "a", "topic": 1.5}], None, "must be a label: a text, a whole number, true or false, got 1.5"),
        (
            [{"question": "a", "topic": float("nan")}],
            None,
            "must be a label: a text, a whole number, true or false, got nan",
        ),
        (
            [{"question": "a", "topic": True}, {"question": "a", "topic": 1}],
            None,
            "must be true or false as in the rows",
        ),
        (
            [{"question": "a", "topic": None}],
            ["x"],
            "must be a label: a text, a whole number, true or false, got None",
        ),
        ([{"question": "a", "topic": "x"}, {"question": "a", "topic": 0}], None, "must be text as in the rows before"),
        (
            [{"question": "a", "topic": 0}, {"question": "a", "topic": "x"}],
            None,
            "must be a whole number as in the rows",
        ),
        ([{"question": "a"}], None, "is missing, known: question"),
    ],
)
def test_a_bad_label_is_told_with_line_and_column(
    tmp_path: Path, values: list[Any], labels: list[str] | None, message: str
) -> None:
    path = lines(tmp_path / "rows.jsonl", *values)
    *good, bad = read(path, KINDS, labels)
    assert all(isinstance(row, ReadRow) for row in good)
    assert isinstance(bad, BadRow) and bad.origin == f"{path}:{len(values)}"
    assert bad.reason.startswith('column "topic": ') and message in bad.reason


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("text", None, "must be text, got None"),
        ("text", ["a"], "must be text, got ['a']"),
        ("texts", [], "must be a list of texts, got []"),
        ("texts", ["a", 1], "must be text, got 1"),
        ("messages", "hello", "must be a list of messages, got 'hello'"),
        ("messages", [{"role": "user"}], "a message must have role and content"),
        ("messages", [{"role": "usr", "content": "a"}], 'did you mean "user"?'),
        ("messages", [{"role": "user", "content": 4}], "must be text, got 4"),
    ],
)
def test_a_value_of_another_kind_is_told(tmp_path: Path, kind: str, value: Any, message: str) -> None:
    (bad,) = read(lines(tmp_path / "rows.jsonl", {"x": value}), {"x": kind})
    assert isinstance(bad, BadRow) and bad.reason.startswith('column "x": ') and message in bad.reason


def test_labels_by_name_and_by_number(tmp_path: Path) -> None:
    rows = [{"question": "a", "topic": "y"}, {"question": "b", "topic": 0}]
    found = read(lines(tmp_path / "rows.jsonl", *rows), KINDS, ["x", "y"])
    assert [row.values["topic"] for row in found if isinstance(row, ReadRow)] == ["y", "x"]
    (tmp_path / "rows.csv").write_text("question,topic\na,1\n", encoding="utf-8")  # CSV has no numbers
    (row,) = read(tmp_path / "rows.csv", KINDS, ["x", "y"])
    assert isinstance(row, ReadRow) and row.values["topic"] == "y"


def test_labels_as_pandas_and_python_write_them(tmp_path: Path) -> None:
    for values, labels, names in (
        ([0.0, 1.0, 1], None, ["0", "1", "1"]),
        ([True, False], None, ["true", "false"]),
        ([1.0, True, 0], ["no", "yes"], ["yes", "yes", "no"]),
    ):
        path = lines(tmp_path / "rows.jsonl", *({"question": "a", "topic": value} for value in values))
        assert [row.values["topic"] for row in read(path, KINDS, labels) if isinstance(row, ReadRow)] == names


def test_columns_have_other_names_in_each_source(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"q": "a", "t": "x"})
    (row,) = read(path, KINDS, columns={"question": "q", "topic": "t"})
    assert isinstance(row, ReadRow) and row.values == {"question": "a", "topic": "x"}
    (tmp_path / "rows.csv").write_text("q,t\na,1\n", encoding="utf-8")
    with pytest.raises(HfkitError, match='has no column "topic", .*; set columns.topic: <column>'):
        read(tmp_path / "rows.csv", KINDS, columns={"question": "q"})
    (tmp_path / "rows.txt").write_text("a\n", encoding="utf-8")
    with pytest.raises(HfkitError, match="a .txt file has a text only, not question, topic"):
        read(tmp_path / "rows.txt", KINDS)


def test_every_kind_is_stored_and_read_again(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    rows = [{"p": f"text {n}", "r": ["one", "two"], "l": n % 2, "m": chat} for n in range(80)]
    path = lines(tmp_path / "rows.jsonl", *rows)
    kinds = {"p": "text", "r": "texts", "l": "label", "m": "messages"}
    values = {"stage": "prepare", "sources": [{"files": str(path)}], "columns": kinds, "labels": ["even", "odd"]}
    prepare.run(prepare.Recipe.model_validate({**values, "split": {"validation": 0.2, "test": 0.2}}), {}, tmp_path)
    stored = [row for split in prepare.SPLITS for row in corpus.rows(str(tmp_path), split)]
    assert len(stored) == 80
    for row in stored:
        number = int(row["p"].split()[1])
        assert row["l"] == ("even", "odd")[number % 2] and row["r"] == ["one", "two"] and row["m"] == chat
        assert row["source"] == f"{path}:{number + 1}"


def test_a_group_is_never_parted(tmp_path: Path) -> None:
    rows = [{"text": f"{n}", "topic": f"group {n % 40}"} for n in range(400)]
    path = lines(tmp_path / "rows.jsonl", *rows)
    recipe = {"stage": "prepare", "sources": [{"files": str(path)}], "columns": {"text": "text", "topic": "label"}}
    split = {"validation": 0.2, "test": 0.2, "by": "topic"}
    prepare.run(prepare.Recipe.model_validate({**recipe, "split": split}), {}, tmp_path)
    groups = [{row["topic"] for row in prepared(tmp_path, name)} for name in prepare.SPLITS]
    assert all(groups) and sum(map(len, groups)) == 40


def test_weights_repeat_and_thin_the_training_rows_only(tmp_path: Path) -> None:
    """Of 1,000 rows, 2.5 times each: the mean of the copies has a standard error of 0.016."""
    path = lines(tmp_path / "rows.jsonl", *({"text": f"row {n}"} for n in range(1000)))
    recipe = {"stage": "prepare", "sources": [{"files": str(path), "weight": 2.5}]}
    prepare.run(prepare.Recipe.model_validate(recipe), {}, tmp_path)
    train, test = prepared(tmp_path), prepared(tmp_path, "test")
    different = {row["text"] for row in train}
    assert 2.4 < len(train) / len(different) < 2.6
    assert len({row["text"] for row in test}) == len(test) and len(different) + 2 * len(test) > 900


def test_rows_alike_in_the_named_columns_are_kept_once(tmp_path: Path) -> None:
    rows = [{"text": f"row {n // 2}", "topic": str(n % 2)} for n in range(600)]
    path = lines(tmp_path / "rows.jsonl", *rows)
    recipe = {"stage": "prepare", "sources": [{"files": str(path)}], "columns": {"text": "text", "topic": "label"}}
    assert prepare.run(prepare.Recipe.model_validate(recipe), {}, tmp_path)["rows"] == 600
    found = prepare.run(prepare.Recipe.model_validate({**recipe, "deduplicate": ["text"]}), {}, tmp_path)
    assert found["rows"] == 300 and found["dropped"] == {"duplicate": 300}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"split": {"by": "topc"}}, ("split.by", 'topc: is not in `columns`, did you mean "topic"?')),
        ({"deduplicate": ["txt"]}, ("deduplicate", 'txt: is not in `columns`, did you mean "text"?')),
        (
            {"columns": {"text": "text"}, "labels": ["a"]},
            ("labels", "no column is a label; write `columns: {<name>: label}`, or `labels` for lists of them"),
        ),
    ],
)
def test_names_that_are_no_columns_are_told_before_reading(keys: dict[str, Any], problem: tuple[str, str]) -> None:
    recipe = {
        "stage": "prepare",
        "sources": [{"builtin": "python-stdlib"}],
        "columns": {"text": "text", "topic": "label"},
    }
    assert list(prepare.check(prepare.Recipe.model_validate({**recipe, **keys}), {})) == [problem]


def test_the_functions_of_the_library_hide_their_docstrings() -> None:
    functions = list(stdlib.functions())
    assert len(functions) > 2000
    for found in functions[::50]:
        assert str(found["summary"]) not in str(found["code"]) and len(str(found["summary"]).split()) >= 3
        assert str(found["code"]).lstrip().startswith(("def ", "async def ", "@"))
    labels = {found["package"] for found in stdlib.packages()}
    assert {"asyncio", "email", "unittest"} <= labels and len(labels) >= 8


def test_functions_and_documents_of_a_module_are_in_the_same_split(tmp_path: Path) -> None:
    """A model pretrained on the training documents has not read the functions that it is tested on."""
    for name, columns in (
        ("python-stdlib", {"text": "text"}),
        ("python-functions", {"code": "text", "summary": "text"}),
    ):
        recipe = {"stage": "prepare", "sources": [{"builtin": name}], "columns": columns}
        (tmp_path / name).mkdir()
        prepare.run(prepare.Recipe.model_validate(recipe), {}, tmp_path / name)
    trained_on = {row["source"].removeprefix("python-stdlib/") for row in prepared(tmp_path / "python-stdlib")}
    tested_on = {
        row["source"].split("/", 1)[1].rsplit(":", 1)[0] for row in prepared(tmp_path / "python-functions", "test")
    }
    assert len(tested_on) >= 10 and not trained_on & tested_on
