"""The prepare stage: what is read, what is kept, and what the user is told."""

import gzip
import importlib
import io
import itertools
import json
import random
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import zstandard

from hfkit.data import cleaning, corpus
from hfkit.data.columns import BadRow, Columns, ReadRow
from hfkit.data.sources import reading, stdlib
from hfkit.data.sources.reading import Source
from hfkit.errors import HfkitError
from hfkit.stages import prepare

ROWS = ['two lines,\n"quoted"', "naïve 中文 🙂 \t", "third"]
COMPRESS: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
BOM = b"\xef\xbb\xbf"
LINE = '{"text": "fine"}\n'


def read(**source: Any) -> list[ReadRow | BadRow]:
    return list(reading.read(Source.model_validate(source), Columns({"text": "text"})))


def document(text: str, origin: str) -> ReadRow:
    return ReadRow({"text": text}, origin)


def texts(**source: Any) -> list[str]:
    return [row.values["text"] if isinstance(row, ReadRow) else f"bad row: {row}" for row in read(**source)]


def run(output: Path, *places: dict[str, Any], **keys: Any) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The metrics, and for each stored text its split and its source."""
    output.mkdir(parents=True, exist_ok=True)
    recipe = prepare.Recipe.model_validate({"stage": "prepare", "sources": list(places), **keys})
    metrics = prepare.run(recipe, {}, output)
    stored: dict[str, tuple[str, str]] = {}
    for split in prepare.SPLITS:
        table = pyarrow.parquet.read_table(output / f"{split}.parquet")
        stored |= {row["text"]: (split, row["source"]) for row in table.to_pylist()}
    return metrics, stored


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def many(folder: Path, count: int = 300) -> dict[str, Any]:
    """A source with so many documents that every split has some."""
    lines = "\n".join(f"document {number}" for number in range(count))
    return {"files": write(folder / f"many-{count}.txt", lines), "document": "line"}


def table(rows: list[Any], suffix: str, column: str = "text") -> bytes:
    """The rows as the content of a file that has columns."""
    if suffix == ".jsonl":
        return "".join(json.dumps({column: row, "n": 1}) + "\n" for row in rows).encode()
    content = io.BytesIO()
    writer = pyarrow.csv.write_csv if suffix == ".csv" else pyarrow.parquet.write_table
    writer(pyarrow.table({column: rows, "n": [1] * len(rows)}), content)
    return content.getvalue()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_column_formats_give_their_rows_in_order(tmp_path: Path, suffix: str, compression: str) -> None:
    content = (b"" if suffix == ".parquet" else BOM) + table(ROWS, suffix, "body")
    path = write(tmp_path / f"a{suffix}{compression}", COMPRESS[compression](content))
    assert texts(files=path, text="body") == ROWS
    assert texts(files=path, text="body", limit=2) == ROWS[:2]


@pytest.mark.parametrize("document", ["file", "line", "passage"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_plain_formats(tmp_path: Path, suffix: str, compression: str, document: str) -> None:
    path = write(tmp_path / f"a{suffix}{compression}", COMPRESS[compression](BOM + " á\t\n\nb\n".encode()))
    assert texts(files=path, document=document) == ([" á\t", "", "b"] if document == "line" else [" á\t\n\nb\n"])


def test_passages_keep_all_text_and_end_at_the_first_empty_line_after_4000_characters(tmp_path: Path) -> None:
    rng = random.Random(0)
    content = "".join("x" * rng.randrange(200) * (rng.random() < 0.9) + "\n" for _ in range(2000)) + "end"
    path = write(tmp_path / "a.txt", content)
    rows = read(files=path, document="passage")
    assert "".join(row.values["text"] for row in rows) == content and len(rows) > 10
    line = 1
    for row in rows:
        assert row.origin == f"{path}:{line}"
        line += row.values["text"].count("\n")
    for row in rows[:-1]:
        assert (
            len(row.values["text"]) > 4000
            and row.values["text"].endswith("\n\n")
            and "\n\n" not in row.values["text"][4000:-1]
        )


def test_folder_glob_and_several_sources_with_their_origins(tmp_path: Path) -> None:
    b = write(tmp_path / "b.txt", "from b")
    a = write(tmp_path / "sub" / "a.jsonl", table(["from a", "more"], ".jsonl"))
    write(tmp_path / "picture.png", b"\x89PNG")
    assert texts(files=str(tmp_path)) == ["from b", "from a", "more"]
    assert texts(files=str(tmp_path / "**" / "*.jsonl")) == ["from a", "more"]
    assert texts(files=write(tmp_path / "odd[1].txt", "brackets")) == ["brackets"]
    filler = many(tmp_path / "filler")
    _, stored = run(tmp_path / "out", {"files": a, "limit": 1}, {"files": b}, filler)
    assert stored["from a"][1] == f"{a}:1" and stored["from b"][1] == b and "more" not in stored
    assert stored["document 7"][1] == f"{filler['files']}:8"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path / "caf\udce9.txt", "an old name")
    assert "an old name" in run(tmp_path, {"files": f"{tmp_path}/caf*.txt"}, many(tmp_path))[1]


def test_stdlib_gives_its_modules_in_one_order_and_no_tests() -> None:
    names = [name for name, _ in stdlib.documents()]
    assert names == [name for name, _ in stdlib.documents()] == sorted(names, key=lambda name: name.split("/"))
    assert "json/decoder.py" in names and len(names) == len(set(names))
    assert not [name for name in names if re.search(r"(^|/)(tests?|idle_test|test_\w+\.py|site-packages)(/|$)", name)]
    assert read(builtin="python-stdlib", limit=1)[0].origin == f"python-stdlib/{names[0]}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "hub" / "train.parquet", table([*ROWS, None], ".parquet", "body"))
    return tmp_path / "hub"


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set(hub: Path, streaming: bool) -> None:
    expected: list[Any] = [document(text, f"{hub}/train:{number}") for number, text in enumerate(ROWS)]
    expected.append(BadRow(f"{hub}/train:3", 'column "body": must be text, got None'))
    assert read(hub=str(hub), text="body", streaming=streaming) == expected
    assert read(hub=str(hub), text="body", streaming=streaming, limit=2) == expected[:2]


HUB_MISTAKES = [
    ({"text": "bodi"}, r'hub \(train\): has no column "bodi", did you mean "body"\?; set text: <column>'),
    ({"split": "valid"}, r"hub: cannot be loaded: .*valid.*; check id, name and split"),
    ({"name": "english"}, r"hub: cannot be loaded: .*'english' not found.*; check id, name and split"),
    ({"hub": "./no/such"}, r"\./no/such: cannot be loaded: .+; check id, name and split"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("keys, message", HUB_MISTAKES)
def test_hub_mistakes(hub: Path, keys: dict[str, Any], message: str, streaming: bool) -> None:
    with pytest.raises(HfkitError, match=message):
        read(**{"hub": str(hub), "text": "body", "streaming": streaming} | keys)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("first, second", [("", ""), (LINE, LINE + '{"text": "half')], ids=["empty", "bad later"])
def test_hub_file_that_cannot_be_read(hub: Path, first: str, second: str, streaming: bool) -> None:
    (hub / "train.parquet").unlink()
    write(hub / "train-00000.jsonl", first)
    write(hub / "train-00001.jsonl", second)
    with pytest.raises(HfkitError, match=r"hub: cannot be (loaded|read): \S"):
        read(hub=str(hub), streaming=streaming)


KEPT = "“quotes” ‘single’ … ﬁ ｗｉｄｅ &amp;"
CLEANED = [("schÃ¶n", True, "schön"), ("schÃ¶n", False, "schÃ¶n"), (KEPT, True, KEPT), ("scho\u0308n", False, "schön")]


@pytest.mark.parametrize("text, repair, expected", CLEANED)
def test_cleaning(tmp_path: Path, text: str, repair: bool, expected: str) -> None:
    _, stored = run(tmp_path, {"files": write(tmp_path / "a.txt", text)}, many(tmp_path), repair=repair)
    assert expected in stored and (text == expected or text not in stored)


def test_duplicates_are_dropped_across_unicode_forms(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "déjà vu") for form in ("NFC", "NFD", "NFC")]
    source = {"files": write(tmp_path / "a.jsonl", table([*forms, "déjà vu!"], ".jsonl"))}
    metrics, stored = run(tmp_path, source, many(tmp_path))
    assert metrics["dropped"] == {"duplicate": 2} and {forms[0], "déjà vu!"} <= stored.keys()
    kept, _ = run(tmp_path, source, many(tmp_path), deduplicate=False)
    assert kept["rows"] == metrics["rows"] + 2 and kept["dropped"] == {}


def test_a_document_stays_in_its_split_when_others_come(tmp_path: Path) -> None:
    before = run(tmp_path / "a", many(tmp_path))[1]
    after = run(tmp_path / "b", {"files": write(tmp_path / "other.txt", "other")}, many(tmp_path, 900))[1]
    assert len(before) == 300 and len(after) == 901
    assert {text: after[text][0] for text in before} == {text: split for text, (split, _) in before.items()}


def test_splits_have_the_shares_asked_for_and_are_counted(tmp_path: Path) -> None:
    metrics, stored = run(tmp_path, many(tmp_path, 5000), split={"validation": 0.2, "test": 0.1})
    assert metrics["rows"] == len(stored) == 5000 and metrics["bytes"] == sum(map(len, stored))
    for split, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        members = [text for text, (place, _) in stored.items() if place == split]
        size = sum(map(len, members))
        assert metrics["splits"][split] == {"rows": len(members), "bytes": size, "characters": size}
        assert len(members) / 5000 == pytest.approx(share, abs=0.02)
        assert list(corpus.texts(str(tmp_path), split)) == members


def test_a_source_goes_into_the_split_that_it_names_whole_and_training_loses_its_duplicates(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", table(["document 1", "document 2", "own"], ".jsonl"))
    own = {"files": path, "into": "test"}
    metrics, stored = run(tmp_path / "a", many(tmp_path, 2000), own, split={"validation": 0.2})
    assert [text for text, (split, _) in stored.items() if split == "test"] == ["document 1", "document 2", "own"]
    assert stored["document 1"][1] == f"{path}:1" and metrics["dropped"] == {"duplicate": 2}
    assert metrics["splits"]["validation"]["rows"] / 2000 == pytest.approx(0.2, abs=0.03)
    again, _ = run(tmp_path / "b", many(tmp_path, 2000), own, deduplicate=False)
    assert again["splits"]["test"]["rows"] == 3 and again["rows"] == 2003


def test_sources_with_splits_of_their_own_leave_no_row_to_chance(tmp_path: Path) -> None:
    places = [{"files": write(tmp_path / f"{name}.txt", name), "into": name} for name in ("validation", "test")]
    metrics, stored = run(tmp_path, many(tmp_path, 500), *places)
    assert [metrics["splits"][name]["rows"] for name in prepare.SPLITS] == [500, 1, 1]
    assert stored["test"][0] == "test" and stored["validation"][0] == "validation"


def test_a_source_for_training_only_leaves_the_others_their_splits(tmp_path: Path) -> None:
    more = {"files": write(tmp_path / "more.txt", "\n".join(f"more {n}" for n in range(300))), "document": "line"}
    alone = run(tmp_path / "a", many(tmp_path))[1]
    both = run(tmp_path / "b", many(tmp_path), {**more, "into": "train"})[1]
    assert {split for text, (split, _) in both.items() if text.startswith("more")} == {"train"}
    assert {text: both[text][0] for text in alone} == {text: split for text, (split, _) in alone.items()}


def test_mistakes_about_the_split_of_a_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(ValueError, match="split=test: belongs to a hub data set; what rows are for is `into:"):
        Source.model_validate({"files": path, "split": "test"})
    source, split = {"files": path, "into": "test"}, {"validation": 0.1, "test": 0.1}
    recipe = prepare.Recipe.model_validate({"stage": "prepare", "sources": [source], "split": split})
    problem = "sources.0 goes into test, which takes no others; delete one"
    assert list(prepare.check(recipe, {})) == [("split.test", problem)]


def test_dropped_documents_are_counted_by_reason(tmp_path: Path) -> None:
    rows = ["", " \n", "tiny", "tiny", "document 7", "a new document", None, None]
    source = {"files": write(tmp_path / "a.jsonl", table(rows, ".jsonl"))}
    metrics, stored = run(tmp_path, many(tmp_path, 300), source, min_characters=5, bad_rows={"skip": 0.1})
    assert metrics["dropped"] == {"bad row": 2, "duplicate": 1, "empty": 2, "too short": 2}
    assert len(stored) == metrics["rows"] == 300 + len(rows) - sum(metrics["dropped"].values())


BAD_ROWS = {
    "invalid JSON": ("a.jsonl", LINE + '{"text": nope}\n', ":2: not a JSON object: "),
    "truncated": ("a.jsonl", LINE + '{"text": "half', ":2: not a JSON object: "),
    "no object": ("a.jsonl", LINE + '["b"]\n', ":2: not a JSON object but list; write one object a line"),
    "nested too deep": ("a.jsonl", LINE + "[" * 200_000 + "\n", ":2: not a JSON object"),
    "no column": ("a.jsonl", LINE + '{"txt": "b"}\n', ':2: column "text": is missing, did you mean "txt"?'),
    "null": ("a.jsonl", LINE + '{"text": null}\n', ':2: column "text": must be text, got None'),
    "number": ("a.jsonl", LINE + '{"text": 3}\n', ':2: column "text": must be text, got 3'),
    "surrogate": ("a.jsonl", LINE + r'{"text": "\ud800"}', ':2: column "text": is not UTF-8'),
    "surrogate key": ("a.jsonl", LINE + r'{"t\ud800": "b"}', ':2: column "text": is missing'),
    "jsonl byte": ("a.jsonl", LINE.encode() + b'{"text": "\xe9"}\n', ":2: byte 0xe9 is not UTF-8; save the file as"),
    "csv byte": ("a.csv", b"n,text\n1,fine\n2,\xe9\n", ':3: column "text": is not UTF-8; save the file as UTF-8'),
    "csv short row": ("a.csv", "n,text\n1,fine\n2\n", ':3: column "text": must be text, got None'),
    "csv long row": ("a.csv", "n,text\n1,fine\n2,Hello, world\n", ":3: "),
    "file byte": ("a.txt", b"fine\nx\xe9\n", ":2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    "line byte": ("line.txt", b"fine\nx\xe9\n", ":2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    "parquet null": ("a.parquet", table(["fine", None], ".parquet"), ':1: column "text": must be text, got None'),
}


@pytest.mark.parametrize("name, content, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named_and_can_be_skipped(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    source = {"files": path, "document": "line" if name == "line.txt" else "file"}
    with pytest.raises(HfkitError) as caught:
        run(tmp_path, many(tmp_path), source)
    remedy = "; fix the row, or tolerate a share of bad rows: `bad_rows: {skip: 0.01}`"
    assert str(caught.value).startswith(path + message) and str(caught.value).endswith(remedy)
    metrics, stored = run(tmp_path, many(tmp_path), source, bad_rows={"skip": 0.5})
    assert metrics["dropped"] == {"bad row": 1} and ("fine" in stored) == (name != "a.txt")
    assert len(metrics["bad_rows"]) == 1 and metrics["bad_rows"][0].startswith(path + message)
    json.dumps(metrics, ensure_ascii=False).encode()  # as metrics.json is written


def test_more_bad_rows_than_allowed_stop_the_run_with_their_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", table([None] * 25, ".jsonl"))
    with pytest.raises(HfkitError) as caught:
        run(tmp_path, many(tmp_path, 175), {"files": path}, bad_rows={"skip": 0.12})
    head, *shown = str(caught.value).splitlines()
    assert head == "bad_rows.skip=0.12: 25 of 200 rows are bad, more than that share; correct them or raise it:"
    assert shown == [f'  {path}:{line}: column "text": must be text, got None' for line in range(1, 21)]
    assert run(tmp_path, many(tmp_path, 175), {"files": path}, bad_rows={"skip": 0.125})[0]["rows"] == 175


JSONL = table(ROWS * 200, ".jsonl")
GZIP, ZSTD = gzip.compress(JSONL), zstandard.compress(JSONL)
BAD_FILES = {
    "unknown format": ("a.pdf", b"x", r"a\.pdf: format \.pdf is not read; known: \.txt .* \(\.gz, \.zst\)"),
    "no suffix": ("a.gz", gzip.compress(b"x"), r"a\.gz: format without a suffix is not read; known: \.txt"),
    "csv column": ("a.csv", b"n,txt\n1,a\n", r'a\.csv: has no column "text", did you mean "txt"\?; set text: <col'),
    "column": (
        "a.parquet",
        table(["a"], ".parquet", "txt"),
        r'has no column "text", did you mean "txt"\?; set text: ',
    ),
    "no parquet": ("a.parquet", b"text" * 9, r"a\.parquet: not a Parquet file: .+; restore or remove the file"),
    "gzip truncated": ("a.jsonl.gz", GZIP[:-20], r"a\.jsonl\.gz: cannot be read: \S.+; restore or remove the file"),
    "gzip damaged": ("a.jsonl.gz", GZIP[:40] + b"\0" * 20 + GZIP[60:], r"cannot be read: \S.+; restore or remove"),
    "no gzip": ("a.jsonl.gz", JSONL, r"cannot be read: Not a gzipped file .+; restore or remove the file"),
    "zstd truncated": ("a.txt.zst", ZSTD[:-20], r"a\.txt\.zst: cannot be read: \S.+; restore or remove the file"),
    "prepared column": (
        "train.parquet",
        table(["a"], ".parquet", "b"),
        'has no column "text"; make it with a recipe of',
    ),
    "prepared damaged": ("train.parquet", b"text" * 9, r"train\.parquet: cannot be read: .+; prepare the data again"),
    "prepared null": ("train.parquet", table(["a", None], ".parquet"), r"train\.parquet"),
    "no zstd": ("a.txt.zst", JSONL, r"a\.txt\.zst: cannot be read: \S.+; restore or remove the file"),
}


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(HfkitError, match=message):
        list(corpus.texts(str(tmp_path), "train")) if name == "train.parquet" else read(files=path)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "cp1250"])
def test_ftfy_is_asked_of_places_alone_and_mends_what_it_mends_in_whole_texts(encoding: str) -> None:
    """Right texts in several scripts, and the same decoded wrongly, far apart and at the ends."""
    import ftfy
    from ftfy.badness import is_bad

    words = ["Größe", "naïve café", "Ωμέγα", "привет", "日本語", "“quoted” — and … more", "fin\u00a0", "œuvre", "Ðæ"]
    rng, bad = random.Random(0), 0
    for _ in range(400):
        parts = [rng.choice(words) if rng.random() < 0.3 else "x" * rng.randrange(12) for _ in range(12)]
        text = rng.choice(["", " "]).join(parts).encode().decode(encoding, errors="replace")
        assert cleaning.clean(text, True) == unicodedata.normalize("NFC", ftfy.fix_encoding(text))
        bad += is_bad(text)
    assert (bad > 200) == (encoding != "utf-8")


def shapes(pattern: Any) -> set[str]:
    """What a parsed pattern may match: a character in each place, `a` where it may be ASCII and `n` where not."""
    found = {""}
    for operation, argument in pattern:
        name = str(operation)
        if name == "BRANCH":
            here = {shape for each in argument[1] for shape in shapes(each)}
        elif name == "SUBPATTERN":
            here = shapes(argument[3])
        elif name == "MAX_REPEAT":
            low, high, repeated = argument
            here = {
                "".join(some) for n in range(low, high + 1) for some in itertools.product(shapes(repeated), repeat=n)
            }
        elif name == "AT":
            here = {""}
        elif name == "LITERAL":
            here = {"a" if argument < 128 else "n"}
        elif name == "IN":
            kinds = {"LITERAL": lambda code: code >= 128, "RANGE": lambda codes: codes[0] >= 128}
            here = {"n" if all(kinds.get(str(kind), lambda _: False)(value) for kind, value in argument) else "a"}
        else:
            assert name == "ANY"
            here = {"a"}
        found = {before + after for before in found for after in here}
    return found


def test_no_pattern_of_ftfy_reaches_beyond_what_is_shown_to_it() -> None:
    """So the verdict is that on the whole text, whatever the text is."""
    from ftfy.badness import BADNESS_RE

    parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    found = shapes(parser.parse(BADNESS_RE.pattern, BADNESS_RE.flags))
    assert len(found) > 5 and max(map(len, found)) >= 5, "the patterns are understood"
    for shape in found:
        first, *between, last = shape.split("n")  # which fails for one without a character that is not ASCII
        assert max(len(first), len(last)) <= cleaning.CONTEXT
        assert all(len(gap) <= 2 * cleaning.CONTEXT for gap in between)
    for gap in range(9):  # two places whose surroundings overlap, touch, or stand apart
        for text in (
            f"é{'1' * gap}a Ã b",
            f"Ã{' ' * gap}a Ã",
            f"œ{'a' * gap}œ",
            f"ГўВЂВ{'x' * gap}é",
            "x" * gap + "Ã ",
        ):
            assert cleaning.may_be_mojibake(text) == bool(BADNESS_RE.search(text)), text


@pytest.mark.parametrize("name", ["none.txt", "*.none"])
def test_missing_file_is_told_before_the_run(tmp_path: Path, name: str) -> None:
    recipe = prepare.Recipe.model_validate({"stage": "prepare", "sources": [{"files": f"{tmp_path}/{name}"}]})
    message = f"{tmp_path}/{name}: no such file; name a file, a folder or a glob that exists"
    assert list(prepare.check(recipe, {})) == [("sources.0.files", message)]


@pytest.mark.parametrize(
    "text, message", [(" ", r"train: no rows \(0 in all; dropped: 1 empty\); give more data"), ("a", "passage")]
)
def test_too_few_documents(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HfkitError, match=message):
        run(tmp_path, {"files": write(tmp_path / "a.txt", text)})
