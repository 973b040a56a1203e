"""What one entry is enough for: a metric, a loss, a kind of artifact and a stage are each added in one place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import write_world

METRIC = """
from hfkit.metrics import catalogue
catalogue.CATALOGUE += (
    catalogue.Metric("wit", "texts", ("generate",), ("wit",), "text:ExactMatch", in_training=("wit",),
                     on_hub={"wit": "wit"}, quality=(9, "wit")),
)
from hfkit.engine import schema
from hfkit.recipe import limits
from hfkit.reports import metadata

known = schema.of_stage("evaluate")["properties"]["metrics"]
assert "wit" in str(known), known
assert "wit" in catalogue.fitting("generate") and "wit" not in catalogue.fitting("classify")
assert "wit" in catalogue.scores_of_training("generate") and "wit" in catalogue.qualities()
assert not list(limits.check_best({"metric_for_best_model": "wit"}, catalogue.scores_of_training("generate")))
assert [each.name for each in metadata.scores_of({"wit": 0.5})] == ["wit"]
from hfkit.metrics.scoring import statistics
print(statistics(["wit"], ["a"], [["a"]])["wit"].scores())
"""
LOSS = """
from hfkit.distillation import catalogue
catalogue.LOSSES["total_variation"] = catalogue.LossSpec(
    "total_variation", "between probabilities", "logits", ("temperature",), "mine:total_variation"
)
from hfkit.distillation.settings import Loss
from hfkit.engine import schema

assert "between probabilities" in str(schema.of_stage("distill")["$defs"]["Loss"]["properties"]["loss"])
try:
    Loss(loss="total_variation", beta=0.5)
except ValueError as error:
    assert "total_variation has no such argument, it takes temperature" in str(error)
from hfkit import cli
assert cli.main(["run", "recipes/pretrain.yaml"]) == 0
assert cli.main(["run", "distill.yaml"]) == 0
"""
FUNCTION = """
import torch

def total_variation(student, teacher, temperature=1.0):
    student, teacher = (torch.softmax(each.float() / temperature, -1) for each in (student, teacher))
    return (student - teacher).abs().sum(-1) / 2
"""
DISTILL = """
stage: distill
teacher: runs/pretrain
data: runs/data
student: {from_teacher: {layers: [0]}}
sequence_length: 32
baseline: false
losses: [{loss: total_variation, temperature: 2.0}]
train: {max_steps: 2, per_device_train_batch_size: 2, torch_compile: false, bf16: false, logging_steps: 1}
"""
STAGE = '''
from typing import Annotated, Any, ClassVar, Literal
from hfkit.recipe.fields import Input, StageRecipe

class Recipe(StageRecipe):
    """The lines of a text, counted."""

    MAKES: ClassVar[str] = "evaluation"
    DISTRIBUTED: ClassVar[bool] = False
    SUMMARY: ClassVar[str] = "How many rows there are."

    stage: Literal["count"]
    data: Annotated[str, Input("data set")]

def check(recipe, places, recipes):
    yield from ()

def run(recipe, places, output):
    from hfkit.data import corpus
    return {"rows": len(corpus.read_split(places["data"], "train"))}
'''
COSTS = """
from hfkit.planning.work import Chore, Work

def describe(recipe, places):
    return {"counts": places["data"]}

def work(recipe, known):
    return Work([Chore("counting", 1.0)])
"""
USE_STAGE = """
from hfkit import stages
from hfkit.planning import stages as costs
stages.__path__.append("own/stages")
costs.__path__.append("own/costs")
from hfkit import cli
from hfkit.engine import graph, schema
assert "count" in graph.stage_names() and schema.of_stage("count")["properties"]["data"]
assert cli.main(["plan", "count.yaml"]) == 0
assert cli.main(["run", "count.yaml"]) == 0
"""


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_metric_is_one_entry(tmp_path: Path) -> None:
    assert "{'wit': 1.0}" in run(METRIC, tmp_path).replace("exact_match", "wit")


def test_a_loss_is_one_entry(tmp_path: Path) -> None:
    write_world(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTION, encoding="utf-8")
    (tmp_path / "distill.yaml").write_text(DISTILL, encoding="utf-8")
    run(LOSS, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "runs/distill/metrics.jsonl").read_text().splitlines()]
    assert 0 < log[0]["loss"] < 1  # a total variation


def test_a_stage_is_a_file_and_what_it_costs(tmp_path: Path) -> None:
    write_world(tmp_path)
    for name, text in (("stages", STAGE), ("costs", COSTS)):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "count.py").write_text(text, encoding="utf-8")
    (tmp_path / "count.yaml").write_text("stage: count\ndata: recipes/data.yaml\n", encoding="utf-8")
    shown = run(USE_STAGE, tmp_path)
    assert "counts" in shown and "counting" in shown
    made = json.loads((tmp_path / "runs/count/metrics.json").read_text(encoding="utf-8"))
    assert made["rows"] > 100
    assert "How many rows there are." in (tmp_path / "runs/count/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("makes", ["export"])
def test_a_kind_of_artifact_is_one_record(makes: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hfkit.artifacts.kinds import KINDS, Kind
    from hfkit.reports.card import _limits
    from hfkit.reports.snippets import snippet

    monkeypatch.setitem(KINDS, makes, Kind(makes, "model", "logits", snippet="run({name})", limits=("For the edge.",)))
    content = {"makes": makes, "recipe": {}, "metrics": {}, "stage": makes, "inputs": {}}
    assert _limits(content) == ["For the edge."] and snippet(tmp_path, content, "org/name") == 'run("org/name")'
