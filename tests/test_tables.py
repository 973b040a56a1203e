"""What one entry is enough for: a metric, a task, a loss, a kind of artifact, a stage are each added in one place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import write_world

METRIC = """
from hfkit.metrics import catalogue
catalogue.CATALOGUE += (
    catalogue.Metric("wit", "texts", ("wit",), "text:ExactMatch", in_training=("wit",),
                     on_hub={"wit": "wit"}, quality=(9, "wit")),
)
from hfkit.engine import schema
from hfkit.recipe import limits
from hfkit.reports import metadata

known = schema.of_stage("evaluate")["properties"]["metrics"]
assert "wit" in str(known), known
assert "wit" in catalogue.fitting(["texts"]) and "wit" not in catalogue.fitting(["classes"])
assert "wit" in catalogue.scores_of_training(["texts"]) and "wit" in catalogue.qualities()
assert not list(limits.check_best({"metric_for_best_model": "wit"}, catalogue.scores_of_training(["texts"])))
assert [each.name for each in metadata.scores_of({"wit": 0.5})] == ["wit"]
from hfkit.metrics.scoring import statistics
print(statistics(["wit"], ["a"], [["a"]])["wit"].scores())
"""
TASK = """
import sys
sys.path.insert(0, ".")
from hfkit.data import tasks
from shout import Shout
tasks.TASKS["shout"] = Shout
from hfkit import cli
from hfkit.engine import schema
sys.stderr = sys.stdout

for stage in ("finetune", "evaluate", "quantize"):
    assert "shout" in schema.of_stage(stage)["properties"]["task"]["enum"], stage
assert "shout: the text in capitals." in str(schema.of_stage("finetune"))
assert cli.main(["run", "recipes/shout.yaml", "task=shoot"]) == 2
assert cli.main(["run", "recipes/shout.yaml"]) == 0
assert cli.main(["run", "evaluate.yaml"]) == 0
"""
OWN_TASK = """
import dataclasses
from typing import ClassVar
from hfkit.data.tasks.generate import Generate

@dataclasses.dataclass(frozen=True)
class Shout(Generate):
    name: ClassVar[str] = "shout"
    about: ClassVar[str] = "the text in capitals"

    def columns(self):
        return {"text": ("data", "text")}

    def column_problems(self):
        return iter(())

    def prompt_ids(self, row, tokenizer, length, is_whole=False):
        return tokenizer(row["text"][:8] + " ->")["input_ids"][:length], False

    def encode(self, row, tokenizer, length):
        from hfkit.data.tasks import Example

        ids, answer = self.prompt_ids(row, tokenizer, 16)[0], tokenizer(self.references(row)[0])["input_ids"]
        return [Example(ids + answer, [False] * len(ids) + [True] * len(answer))] if len(answer) < length - 16 else []

    def references(self, row):
        return [row["text"][:8].upper()]
"""
SHOUT = """
stage: finetune
model: pretrain.yaml
data: data.yaml
task: shout
sequence_length: 32
evaluation_rows: 2
generation: {max_new_tokens: 4}
train: {max_steps: 2, per_device_train_batch_size: 2, torch_compile: false, bf16: false, logging_steps: 1}
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

def check(recipe, inputs):
    yield from ()

def run(recipe, inputs, output):
    from hfkit.data import corpus
    return {"rows": len(corpus.read_split(inputs["data"].path, "train"))}
'''
COSTS = """
from hfkit.planning.work import Chore, Work

def describe(recipe, inputs):
    return {"counts": inputs["data"].path}

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


def test_a_task_is_one_file(tmp_path: Path) -> None:
    write_world(tmp_path)
    (tmp_path / "shout.py").write_text(OWN_TASK, encoding="utf-8")
    (tmp_path / "recipes/shout.yaml").write_text(SHOUT, encoding="utf-8")
    scored = "stage: evaluate\nmodel: recipes/shout.yaml\ndata: recipes/data.yaml\ntask: shout\nlimit: 3\n"
    (tmp_path / "evaluate.yaml").write_text(scored, encoding="utf-8")
    assert "must be one of generate, chat, classify, shout" in run(TASK, tmp_path)
    for line in (tmp_path / "runs/evaluate/predictions.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["references"][0].isupper()
    assert "`task: shout`" in (tmp_path / "runs/evaluate/README.md").read_text(encoding="utf-8")


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
