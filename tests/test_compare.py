"""Comparisons: the rows, who dominates whom, the report, the processes that measure, and what bad input gets."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.data import corpus
from hfkit.data.tasks.text import Text
from hfkit.errors import HfkitError
from hfkit.evaluation import comparison, costs, measuring
from hfkit.evaluation.settings import Scoring
from hfkit.recipe import limits
from hfkit.reports import comparison as report
from hfkit.runtime import isolated, signals

COMPARE = """\
stage: compare
models: [runs/pretrain, runs/small, runs/int8]
data: data.yaml
"""
QUANTIZE = "stage: quantize\nmodel: runs/pretrain\ndata: data.yaml\nquantization: {load_in_8bit: true}\n"
RECIPE = "recipes/compare.yaml"
TASK = ["data=tasks.yaml", "prompt='{question} ->'", "completion=' {answer}'", "generation={max_new_tokens: 4}"]
CLASSES = ["task=classify", "data=tasks.yaml", "prompt='{question}'", "label=topic"]
REPORTS = ("hfkit.json", "README.md", "metrics.json", "metrics.jsonl", "loss.png")


@pytest.fixture(scope="module")
def built(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with models to compare: whole, small, in 8 bit, of another tokenizer, an adapter and two classifiers."""
    folder = tmp_path_factory.mktemp("compare") / "world"
    shutil.copytree(prepared, folder)
    (folder / RECIPE).write_text(COMPARE, encoding="utf-8")
    (folder / "recipes/int8.yaml").write_text(QUANTIZE, encoding="utf-8")
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "output_dir=runs/small"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        measured_shortly(patch)
        for recipe, *options in (
            ["pretrain", *small, "train.max_steps=2"],
            ["int8"],
            ["tokenizer", "vocab_size=280", "output_dir=runs/words"],
            ["pretrain", "tokenizer=runs/words", "output_dir=runs/other"],
            ["finetune"],
            ["classify"],
            ["classify", "train.max_steps=2", "output_dir=runs/brief"],
        ):
            assert cli.main(["run", f"recipes/{recipe}.yaml", *options]) == 0
    return folder


@pytest.fixture
def there(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "world"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    measured_shortly(monkeypatch)
    return folder


def measured_shortly(patch: pytest.MonkeyPatch) -> None:
    """In this process, and with few tokens."""
    patch.setattr(comparison, "measure", measuring._measure)
    patch.setattr(costs, "REPETITIONS", 1)
    patch.setattr(costs, "NEW_TOKENS", 4)
    patch.setattr(measuring, "SAMPLE_TOKENS", 4)
    patch.setattr("hfkit.training.saving.draw_loss", lambda log, path: None)


def run(*options: str, code: int = 0) -> dict[str, Any]:
    assert cli.main(["run", RECIPE, *options]) == code
    return json.loads(Path("runs/compare/report.json").read_text(encoding="utf-8"))


def problems(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert cli.main(["run", RECIPE, *options]) == 2
    assert not Path("runs/compare").exists()
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def size_of(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file() and path.name not in REPORTS)


# ---- the rows


def test_every_model_has_a_row_beside_the_first(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run()
    rows = {row["name"]: row for row in found["models"]}
    assert list(rows) == ["pretrain", "small", "int8"] and found["quality"] == "bits_per_byte"
    for name, row in rows.items():
        for score in ("perplexity", "bits_per_byte"):
            assert row[f"{score}_low"] <= row[score] <= row[f"{score}_high"]
            is_first = name == "pretrain"
            assert (f"{score}_difference" in row) != is_first and (f"{score}_p" in row) != is_first
        assert all(row[cost] > 0 for cost in limits.COSTS), name
        assert row["size_bytes"] == size_of(f"runs/{name}")
    for name in ("small", "int8"):
        difference = rows[name]["bits_per_byte"] - rows["pretrain"]["bits_per_byte"]
        assert rows[name]["bits_per_byte_difference"] == pytest.approx(difference, abs=1e-9)
    assert rows["small"]["parameters"] < rows["pretrain"]["parameters"]
    best = [row for row in rows.values() if not any(beats(other, row) for other in rows.values())]
    assert found["undominated"] == [row["name"] for row in best]
    assert 0 < found["model_seconds"] <= found["seconds"]
    shown = capsys.readouterr().out
    assert f"Pareto-optimal: {', '.join(found['undominated'])}" in shown and "over the first" in shown
    metrics = json.loads(Path("runs/compare/metrics.json").read_text(encoding="utf-8"))
    assert metrics["models"]["int8"]["size_bytes"] == rows["int8"]["size_bytes"]


def beats(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """By its definition, for bits per byte."""
    signs = {"bits_per_byte": -1, "size_bytes": -1, "tokens_per_second": 1}
    gains = [sign * (other[key] - row[key]) for key, sign in signs.items()]
    return min(gains) >= 0 and max(gains) > 0


def test_models_of_a_task_and_an_adapter(there: Path) -> None:
    found = run("models=[runs/pretrain, finetune.yaml]", "task=generate", *TASK)
    adapter = found["models"][1]
    assert adapter["name"] == "finetune" and found["quality"] == "rougeL"
    assert adapter["size_bytes"] == size_of("runs/finetune") + size_of("runs/pretrain")
    assert {"rougeL_difference", "bleu_p", "chrf_low", "exact_match", "perplexity_difference"} <= adapter.keys()
    prompts = [f"{row['question']} ->" for row in corpus.rows("runs/tasks", "test")]
    assert [prompt for prompt, _ in adapter["samples"]] == prompts[:3]


def test_classifiers(there: Path) -> None:
    found = run("models=[runs/classify, runs/brief]", *CLASSES)
    assert found["quality"] == "accuracy" and all(row["samples"] == [] for row in found["models"])
    assert all(row["tokens_per_second_batch_8"] > 0 and row["f1_low"] <= row["f1"] for row in found["models"])
    assert "What they write" not in Path("runs/compare/report.md").read_text(encoding="utf-8")


def test_models_of_other_tokens_are_compared_by_bytes(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = "models=[runs/pretrain, runs/other]"
    for asked in ("metrics=[perplexity]", 'accept={perplexity: "<= 2x base"}'):
        told = problems(capsys, two, asked)
        assert "perplexity is per token, and runs/other has other tokens than runs/pretrain; use bits_per_byte" in told
    other = run(two)["models"][1]
    assert "bits_per_byte_difference" in other and {"perplexity", "perplexity_low"} <= other.keys()
    assert not [key for key in other if key.startswith(("perplexity_difference", "perplexity_p"))]


def test_another_model_by_an_override(there: Path) -> None:
    found = run("models.1=runs/other", "limit=5", "prompts=[the cat, a dog]")
    assert [row["name"] for row in found["models"]] == ["pretrain", "other", "int8"] and found["rows"] == 5
    assert [prompt for prompt, _ in found["models"][2]["samples"]] == ["the cat", "a dog"]


def test_limits_are_held_by_each_model_after_the_first(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run('accept={size_bytes: "<= 0.3x base", bits_per_byte: "<= 9"}', code=3)
    limits = json.loads(Path("runs/compare/metrics.json").read_text(encoding="utf-8"))["accept"]
    told = [(each["name"], each["metric"], each["kept"]) for each in limits]
    sizes = {name: size_of(f"runs/{name}") <= 0.3 * size_of("runs/pretrain") for name in ("small", "int8")}
    expected = [[(name, "size_bytes", kept), (name, "bits_per_byte", True)] for name, kept in sizes.items()]
    assert told == sum(expected, []) and not sizes["int8"]
    assert "int8 size_bytes" in capsys.readouterr().err and not Path("runs/compare/hfkit.json").exists()


def test_names_tell_models_apart(there: Path) -> None:
    shutil.copytree("runs/small", "elsewhere/pretrain")
    found = run("models=[runs/pretrain, elsewhere/pretrain, runs/int8]", "limit=3")
    assert [row["name"] for row in found["models"]] == ["runs/pretrain", "elsewhere/pretrain", "int8"]


def test_the_training_of_what_a_model_was_made_from_counts(there: Path, tmp_path: Path) -> None:
    def made(name: str, seconds: float, **inputs: str) -> str:
        (tmp_path / name).mkdir()
        entries = {key: {"place": str(tmp_path / place)} for key, place in inputs.items()}
        manifest.write_json(tmp_path / name / "hfkit.json", {"seconds": seconds, "inputs": entries})
        return str(tmp_path / name)

    made("data", 1000.0)
    made("teacher", 100.0, data="data")
    made("student", 10.0, teacher="teacher", data="data")
    assert comparison.training_seconds(made("tuned", 1.0, model="student", student="teacher")) == 111.0  # each once
    assert comparison.training_seconds(str(tmp_path)) is None
    seconds = [(manifest.read_json(Path(f"runs/{name}")) or {})["seconds"] for name in ("pretrain", "int8")]
    assert comparison.training_seconds("runs/int8") == pytest.approx(sum(seconds))


# ---- who dominates whom


def rated(quality: float, size: int, speed: float) -> dict[str, Any]:
    return {"accuracy": quality, "bits_per_byte": quality, "size_bytes": size, "tokens_per_second": speed}


@pytest.mark.parametrize(
    ("other", "expected", "expected_lower"),
    [
        (rated(0.5, 100, 10.0), False, False),  # equal in all
        (rated(0.6, 100, 10.0), True, False),
        (rated(0.4, 100, 10.0), False, True),
        (rated(0.5, 99, 10.0), True, True),
        (rated(0.5, 100, 11.0), True, True),
        (rated(0.9, 101, 99.0), False, False),  # larger
        (rated(0.6, 99, 9.0), False, False),  # slower
    ],
)
def test_a_model_dominates_that_is_nowhere_worse(other: dict[str, Any], expected: bool, expected_lower: bool) -> None:
    row = rated(0.5, 100, 10.0)
    assert comparison.dominates(other, row, "accuracy") == expected
    assert comparison.dominates(other, row, "bits_per_byte") == expected_lower


def test_the_front_of_the_picture() -> None:
    points = [(1.0, 1.0, "a"), (2.0, 2.0, "b"), (3.0, 2.0, "c"), (2.0, 2.0, "d"), (0.5, 3.0, "e")]

    def front(is_smaller: bool, is_lower: bool) -> str:
        return "".join(name for _, _, name in report._front(points, is_smaller, is_lower))

    assert front(True, True) == "ae"  # small, and few bits
    assert front(True, False) == "e"
    assert front(False, True) == "ac"
    assert front(False, False) == "ce"


# ---- the report


def test_labels_of_models_that_are_alike_do_not_overlap() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    labels = [report._label(axes, 1.0, 1.0 + index / 1e6, f"model {index}") for index in range(4)]
    figure.draw_without_rendering()
    report._part(labels)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index])


class Loads(HTMLParser):
    """What a page would load, and its tags."""

    def __init__(self, page: str):
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_the_report_stands_alone_and_shows_what_each_model_writes(there: Path) -> None:
    found = run("models=[runs/pretrain, runs/small]", "limit=4")
    folder = Path("runs/compare")
    page = (folder / "report.html").read_text(encoding="utf-8")
    parsed = Loads(page)
    assert all(place.startswith("#") for place in parsed.loaded) and not parsed.tags & {"script", "link", "img"}
    assert "url(http" not in page and "@import" not in page and {"svg", "table", "style"} <= parsed.tags
    text = (folder / "report.md").read_text(encoding="utf-8")
    samples = [row["samples"] for row in found["models"]]
    assert [prompt for prompt, _ in samples[0]] == [prompt for prompt, _ in samples[1]] and len(samples[0]) == 3
    assert all(f"{prompt} >>>" in text for prompt, _ in samples[0])
    assert all(written in text for each in samples for _, written in each)
    assert "pretrain" in text and "| model |" in text
    assert samples[1][0][1] in (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} >= {"report.json", "report.md", "report.html", "metrics.json"}


def test_names_and_texts_are_no_markup(there: Path) -> None:
    found = run("models=[runs/pretrain, runs/small]", "limit=4")
    bad = "<script>alert('$x$ $')</script>"
    found["models"][0]["name"] = found["undominated"][0] = bad
    found["models"][1]["samples"][0] = [bad, f"```\n{bad}"]
    page = report.page(found, bad)
    assert "script" not in Loads(page).tags and "&lt;script&gt;alert" in page
    text = report.markdown(found, bad)
    assert "````text\n```\n<script>" in text  # a longer fence
    assert [line for line in text.splitlines() if "<script>" in line and "\\<script" not in line] == [bad]


# ---- the processes that measure


SCORING = Scoring(Text(), ("bits_per_byte", "perplexity"), batch_size=4)


def die(*_: Any) -> None:
    os._exit(9)


def test_a_process_that_fails_or_ends_is_told(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(corpus.rows("runs/data", "test"))[:2]
    with pytest.raises(HfkitError, match="runs/nothere: no tokenizer can be loaded"):
        measuring.measure(SCORING, rows, "runs/nothere")
    monkeypatch.setattr(isolated, "_answer", die)
    with pytest.raises(HfkitError, match="runs/small: the process that measured it was killed"):
        measuring.measure(SCORING, rows, "runs/small")


def hang(*_: Any) -> None:
    time.sleep(3600)


def test_a_signal_ends_the_process_that_measures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_answer", hang)
    signal.signal(signal.SIGALRM, lambda *_: signals._on_signal(signal.SIGTERM, None))
    signal.alarm(2)
    with pytest.raises(signals.Stopped), signals.handled():
        measuring.measure(SCORING, [], "runs/small")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("has_gpu", [True, False])
def test_beside_a_gpu_nothing_is_imported_before_a_process_begins(has_gpu: bool, tmp_path: Path) -> None:
    """bitsandbytes takes hold of a GPU while it is imported, and no process that is forked afterwards can use it."""
    (tmp_path / "holds.py").write_text("import os\nPROCESS = os.getpid()\nis_own = lambda: PROCESS == os.getpid()\n")
    code = f"from hfkit.runtime import isolated\nisolated._has_gpu = lambda: {has_gpu}\n"
    code += "if __name__ == '__main__':\n    print(isolated.call('holds:is_own'))\n"
    (tmp_path / "main.py").write_text(code)
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(isolated.__file__).parents[2])])}
    command = [sys.executable, str(tmp_path / "main.py")]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.stdout.split() == [str(has_gpu)], done.stderr


def test_each_model_has_the_memory_of_its_own_process(there: Path) -> None:
    rows = list(corpus.rows("runs/data", "test"))[:2]
    found = [measuring.measure(SCORING, rows, f"runs/{name}") for name in ("small", "small", "int8")]
    assert found[0].samples == found[1].samples and (found[0].outcome.sums == found[1].outcome.sums).all()
    assert all((each.costs["memory_bytes"] or 0) > 0 for each in found)


def test_a_comparison_by_the_literal_command(there: Path) -> None:
    """Python runs the recipe as its main module, from which processes of its own begin."""
    done = subprocess.run(
        ["accelerate", "launch", RECIPE, "limit=3", "metrics=[bits_per_byte]"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("== compare") == 1 and done.stdout.count("measuring") == 3
    assert Path("runs/compare/hfkit.json").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["models=[runs/pretrain]"], ["models", "must"]),
        (["models=[runs/pretrain, runs/small, pretrain.yaml]"], ["models.2", "runs/pretrain: is named twice"]),
        (["models=[runs/small, ./runs/small]"], ["models.1", "is named twice; delete one"]),
        (["models.1=runs/nothere"], ["models.1=runs/nothere", "there is no such folder"]),
        (["models.1=nothere.yaml"], ["models.1=nothere.yaml", "there is no such recipe"]),
        (["models.1=runs/data"], ["models.1", "is a data set, but models must be a model"]),
        (["models.1=runs/classify"], ["models.1", "is a classifier and writes no texts"]),
        (["metrics=[accuracy]"], ["metrics.0", "accuracy does not fit `task: text`"]),
        (["task=generate", *TASK, "metrics=[length, distinct]"], ["metrics", "none says which model is better"]),
        (['accept={rougeL: ">= 1"}'], ["accept.rougeL", "is not measured here"]),
        (["accept={size_bytes: small}"], ["accept.size_bytes", 'must be like "<= 1.02x base"']),
        (["prompts=[]"], ["prompts", "must not be empty"]),
        (['prompts=[""]'], ["prompts.0", "must not be empty"]),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    there: Path, capsys: pytest.CaptureFixture[str], options: list[str], messages: list[str]
) -> None:
    told = problems(capsys, *options)
    assert all(message in told for message in messages), told
