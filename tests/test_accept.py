"""Limits on a result: how they are read and judged, and what becomes of a result that misses one."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.evaluation.costs import size_on_disk
from hfkit.metrics.catalogue import score_names
from hfkit.model.loading import base_quantization, load_model
from hfkit.recipe.limits import Limit, judged, limit_of, table
from hfkit.training.trainer import HfkitTrainer
from tests.kit import inside
from tests.test_distill import DISTILL
from tests.test_evaluate import EVALUATE
from tests.test_finetune import problems, run
from tests.test_quantize import QUANTIZE

RECIPE, FOLDER = "recipes/quantize.yaml", Path("runs/quantize")
TOO_SMALL = 'accept:\n  size_bytes: "<= 0.01x base"\n  bits_per_byte: "<= 2x base"\n'
COMPARE = """\
stage: compare
models: [runs/pretrain, runs/quantize]
data: data.yaml
limit: 4
accept: {size_bytes: "<= 0.01x base"}
"""
TUNE = "recipes/finetune.yaml"
# Of a fine-tuning: all of these are kept.
KEPT = {
    "loss": "<= 1x base",
    "rougeL": ">= 0x base",
    "size_bytes": "<= 1.5x base",
    "tokens_per_second": ">= 0.001x base",
}


@pytest.fixture(scope="module")
def rejected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The world with a quantized model that misses a limit, the exit code of that and what was told."""
    told = io.StringIO()
    folder = tmp_path_factory.mktemp("accept") / "world"
    shutil.copytree(prepared, folder)
    (folder / RECIPE).write_text(QUANTIZE + TOO_SMALL, encoding="utf-8")
    with inside(folder), contextlib.redirect_stderr(told):
        code = cli.main(["run", RECIPE])
    return folder, code, told.getvalue()


@pytest.fixture
def kept(rejected: tuple[Path, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that world, as the working directory."""
    shutil.copytree(rejected[0], tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    return tmp_path / "kept"


def code_of(*options: str, recipe: str = RECIPE) -> int:
    return cli.main(["run", recipe, *options])


def file_of(folder: Path) -> tuple[int, int]:
    stat = (folder / "model.safetensors").stat()
    return stat.st_ino, stat.st_mtime_ns


def rows_of(folder: str) -> dict[str, dict[str, Any]]:
    """The judged limits by metric."""
    found = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
    return {row["metric"]: row for row in found["accept"]}


# ---- limits


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("<= 1.02x base", Limit(True, 1.02, True)),
        (">= 0.4", Limit(False, 0.4, False)),
        ("<=3e8", Limit(True, 3e8, False)),
        (" >= 1 x  base ", Limit(False, 1.0, True)),
    ],
)
def test_a_limit_is_read(text: str, limit: Limit) -> None:
    assert limit_of(text) == limit


@pytest.mark.parametrize(
    "text", ["", "1.02", "< 1", "= 1", "<= ", "<= 1.02x", "<= 1 base", "<= base", "<= 1%", "<= .5"]
)
def test_what_is_no_limit_is_told(text: str) -> None:
    with pytest.raises(ValueError, match='must be like "<= 1.02x base" or ">= 0.4", got'):
        limit_of(text)


@pytest.mark.parametrize(
    ("limit", "value", "base", "allowed", "is_kept"),
    [
        ("<= 2", 2.0, None, 2.0, True),
        ("<= 2", 2.1, None, 2.0, False),
        (">= 2", 2.0, 9.0, 2.0, True),
        (">= 2", 1.9, 1.0, 2.0, False),
        ("<= 1.5x base", 3.0, 2.0, 3.0, True),
        ("<= 1.5x base", 3.1, 2.0, 3.0, False),
        (">= 0.5x base", 1.0, 2.0, 1.0, True),
        (">= 0.5x base", 0.9, 2.0, 1.0, False),
        (">= 0", None, 2.0, 0.0, False),  # what was not measured is never kept
        (">= 0x base", 1.0, None, None, False),
        ("<= 2", float("nan"), None, 2.0, False),
    ],
)
def test_a_value_is_judged(limit: str, value: float, base: float, allowed: float, is_kept: bool) -> None:
    (row,) = judged({"loss": limit}, {"loss": value, "bleu": 1.0}, {"loss": base}, name="small")
    assert row["kept"] is is_kept and row["allowed"] == allowed and row["base"] == base
    assert (row["name"], row["metric"], row["limit"]) == ("small", "loss", limit)


def test_the_table_has_a_line_for_each_limit() -> None:
    limits = {"loss": "<= 1.5x base", "size_bytes": "<= 1e6", "gap_closed": ">= 0.5"}
    lines = table(judged(limits, {"loss": 2.0, "size_bytes": 1_234_567, "gap_closed": None}, {"loss": 1.0}))
    assert [line.split() for line in lines] == [
        ["value", "base", "limit"],
        ["loss", "2", "1", "<=", "1.5", "FAILED"],
        ["size_bytes", "1,234,567", "-", "<=", "1,000,000", "FAILED"],
        ["gap_closed", "-", "-", ">=", "0.5", "FAILED"],
    ]
    assert table(judged({"loss": "<= 2"}, {"loss": 1}, {}))[1].endswith("passed")


def test_metrics_give_scores_of_several_names() -> None:
    assert score_names(["bleu", "rouge"]) == ["bleu", "rouge1", "rouge2", "rougeL", "rougeLsum"]


@pytest.mark.parametrize(
    ("recipe", "options", "messages"),
    [
        (RECIPE, ['accept={size_bytes: "< 1"}'], ["accept.size_bytes=< 1", "must be like", "got '< 1'"]),
        (RECIPE, ["accept={size_bytes: 1}"], ["accept.size_bytes=1", "must be a string, got 1"]),
        (RECIPE, ['accept={size_byte: "<= 1"}'], ["accept.size_byte", 'did you mean "size_bytes"?']),
        (TUNE, ['accept={perplexity_low: "<= 1"}'], ["accept.perplexity_low", 'did you mean "perplexity"?']),
        (
            "recipes/classify.yaml",
            ['accept={accuracy: ">= 0.5x base"}'],
            ["accept.accuracy", "of the model before it is not measured; give a number without `x base`"],
        ),
        (
            "recipes/distill.yaml",
            ['accept={gap_closed: ">= 0.5x base"}'],
            ["accept.gap_closed", "of the teacher it is not measured"],
        ),
        ("recipes/distill.yaml", ["baseline=false", 'accept={gap_closed: ">= 0"}'], ["is not measured here"]),
    ],
)
def test_a_bad_limit_is_told_before_anything_runs(
    kept: Path, capsys: pytest.CaptureFixture[str], recipe: str, options: list[str], messages: list[str]
) -> None:
    Path("recipes/distill.yaml").write_text(DISTILL, encoding="utf-8")
    told = problems(capsys, *options, "output_dir=runs/new", recipe=recipe)
    assert all(message in told for message in messages), told
    assert "Traceback" not in told and not Path("runs/new").exists()


# ---- a result that misses one


def test_it_is_kept_but_not_finished(rejected: tuple[Path, int, str], kept: Path) -> None:
    _, code, told = rejected
    assert code == 3 and told.startswith("error: runs/quantize: misses what recipes/quantize.yaml accepts.")
    rows = [line.split() for line in told.splitlines() if "bytes" in line or "bits" in line]
    assert [(row[0], row[-1]) for row in rows] == [("size_bytes", "FAILED"), ("bits_per_byte", "passed")]
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {"model.safetensors", "metrics.json", "README.md", "tokenizer.json"}
    assert manifest.MANIFEST not in names and not list(Path("runs").glob("*.old*"))
    assert load_model(str(FOLDER)).config.quantization_config is not None
    found = rows_of(str(FOLDER))["size_bytes"]
    assert found["value"] == size_on_disk(str(FOLDER)) and found["base"] == size_on_disk("runs/pretrain")


def test_the_same_command_tells_the_same_at_once(
    rejected: tuple[Path, int, str], kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfkit.stages.quantize.run", None)
    before = file_of(FOLDER)
    assert code_of() == 3 and code_of("--force") == 3 and file_of(FOLDER) == before
    assert capsys.readouterr().err == 2 * rejected[2]


def test_fresh_makes_it_anew_and_keeps_the_old_one(kept: Path) -> None:
    before = file_of(FOLDER)
    assert code_of("--fresh") == 3
    assert file_of(Path("runs/quantize.old1")) == before and file_of(FOLDER)[0] != before[0]


def test_with_another_limit_it_is_made_anew_and_finished(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_of(FOLDER)
    assert code_of('accept={size_bytes: "<= 0.9x base"}') == 0
    assert file_of(Path("runs/quantize.old1")) == before
    assert manifest.read_json(FOLDER) is not None and manifest.read_json(FOLDER, manifest.STARTED) is None
    assert [row["kept"] for row in rows_of(str(FOLDER)).values()] == [True]
    assert code_of('accept={size_bytes: "<= 0.9x base"}') == 0 and "up to date" in capsys.readouterr().out


def test_what_needs_it_does_not_run_unless_it_is_named_by_its_folder(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = EVALUATE.replace("runs/pretrain", "quantize.yaml") + "limit: 4\n"
    Path("recipes/evaluate.yaml").write_text(text, encoding="utf-8")
    assert code_of(recipe="recipes/evaluate.yaml") == 3
    told = capsys.readouterr().err
    assert "FAILED" in told and "<key>=runs/quantize  where it is an input, to use it anyway" in told
    assert not Path("runs/evaluate").exists()
    assert code_of("model=runs/quantize", recipe="recipes/evaluate.yaml") == 0


def test_a_comparison_judges_every_model_but_the_first(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes/compare.yaml").write_text(COMPARE, encoding="utf-8")
    assert code_of(recipe="recipes/compare.yaml") == 3
    told = capsys.readouterr().err
    assert told.count("FAILED") == 1 and "quantize size_bytes" in told and "<key>=" not in told
    assert Path("runs/compare/report.md").exists() and not Path("runs/compare/hfkit.json").exists()


# ---- trainings


def test_a_fine_tuning_keeps_its_checkpoints_and_is_not_trained_twice(
    there: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, step = [], HfkitTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(HfkitTrainer, "training_step", counted)
    strict = {**KEPT, "exact_match": ">= 2"}
    assert code_of(f"accept={json.dumps(strict)}", recipe=TUNE) == 3 and len(steps) == 4
    folder, found = Path("runs/finetune"), rows_of("runs/finetune")
    assert (folder / "checkpoint-4").is_dir() and (folder / "adapter_model.safetensors").exists()
    assert not (folder / manifest.MANIFEST).exists()
    assert {metric: row["kept"] for metric, row in found.items()} == {
        **dict.fromkeys(KEPT, True),
        "exact_match": False,
    }
    assert found["loss"]["base"] > found["loss"]["value"] and found["rougeL"]["base"] is not None
    assert found["size_bytes"]["base"] == size_on_disk("runs/pretrain") < found["size_bytes"]["value"]
    assert found["tokens_per_second"]["base"] > 0 and found["tokens_per_second"]["value"] > 0

    told = problems(capsys, f"accept={json.dumps(KEPT)}")
    assert "accept.exact_match: >= 2 -> default" in told and "--force" in told
    assert run("--force", f"accept={json.dumps(KEPT)}")["accept"] != []
    assert len(steps) == 4 and manifest.read_json(folder) is not None and not list(folder.glob("checkpoint-*"))
    again = rows_of("runs/finetune")
    assert all(again[name][key] == found[name][key] for name in ("loss", "rougeL") for key in ("value", "base"))


def test_without_checkpoints_it_is_trained_again_and_the_old_one_kept(there: Path) -> None:
    options, name = ["train.save_strategy=no"], "adapter_model.safetensors"
    assert code_of(*options, 'accept={exact_match: ">= 2"}', recipe=TUNE) == 3
    before = Path("runs/finetune", name).stat().st_ino
    assert code_of(*options, 'accept={exact_match: ">= 0"}', recipe=TUNE) == 0
    assert Path("runs/finetune.old1", name).stat().st_ino == before
    assert {path.name for path in Path("runs/finetune").iterdir()} >= {name, manifest.MANIFEST}


def test_a_classifier_is_held_to_numbers(there: Path) -> None:
    options = ['accept={accuracy: ">= 0", size_bytes: "<= 1"}']
    assert code_of(*options, recipe="recipes/classify.yaml") == 3
    found = rows_of("runs/classify")
    assert found["accuracy"]["kept"] and found["size_bytes"]["value"] == size_on_disk("runs/classify")


def test_a_student_is_held_to_its_teacher(there: Path) -> None:
    Path("recipes/distill.yaml").write_text(DISTILL, encoding="utf-8")
    limits = {"gap_closed": "<= 1e9", "retention": "<= 1e-6", "bits_per_byte": "<= 100x base"}
    assert code_of(f"accept={json.dumps(limits)}", recipe="recipes/distill.yaml") == 3
    metrics = json.loads(Path("runs/distill/metrics.json").read_text(encoding="utf-8"))
    found = rows_of("runs/distill")
    for name in limits:
        assert found[name]["value"] == metrics[name]
    assert found["bits_per_byte"]["base"] == metrics["teacher_bits_per_byte"] and found["bits_per_byte"]["kept"]
    assert found["gap_closed"]["kept"] is (metrics["gap_closed"] is not None)
    assert not found["retention"]["kept"] and found["retention"]["base"] is None
    assert AutoModelForCausalLM.from_pretrained("runs/distill").config.hidden_size == 32


def test_an_adapter_that_is_not_finished_is_measured_on_the_base_it_was_trained_on(tmp_path: Path) -> None:
    manifest.write_json(tmp_path / "adapter_config.json", {})
    manifest.write_json(tmp_path / manifest.STARTED, {"recipe": {"quantization": {"load_in_8bit": True}}})
    assert base_quantization(str(tmp_path)) == {"load_in_8bit": True}
