"""Pruning: what is taken away, what recovers, what is left in the folder, and what bad input gets."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.compression import pruning, recovery
from hfkit.evaluation import comparison, costs, measuring
from hfkit.training.callbacks import read_log
from tests.interrupting import Killed, at, kill
from tests.kit import on_two

PRUNE = """\
stage: prune
model: runs/pretrain
data: data.yaml
metrics: [bits_per_byte]
pruning: {method: sparsegpt, sparsity: 0.5}
calibration: data.yaml
calibration_rows: 16
sequence_length: 32
"""
TRAIN = """\
recover: {}
train:
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  logging_steps: 1
  save_steps: 2
  torch_compile: false
  bf16: false
"""
RECIPE, RECOVER = "recipes/prune.yaml", "recipes/recover.yaml"
MAGNITUDE = ["pruning={method: magnitude, sparsity: 0.5}", "calibration=null"]
TWO_STEPS = "train={max_steps: 2}"
DEPTH = ["pruning={method: depth, drop_layers: 1}"]
TASK = ["data=runs/tasks", "calibration=runs/tasks", "metrics=null", "prompt='{question} ->'", "completion='{answer}'"]


@pytest.fixture
def recipe(there: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipes, without and with a recovery. Models are measured in this process, and shortly."""
    (there / RECIPE).write_text(PRUNE, encoding="utf-8")
    (there / RECOVER).write_text(PRUNE + TRAIN, encoding="utf-8")
    monkeypatch.setattr(comparison, "measure", measuring._measure)
    monkeypatch.setattr(costs, "REPETITIONS", 1)
    monkeypatch.setattr(costs, "NEW_TOKENS", 4)
    monkeypatch.setattr(measuring, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr("hfkit.training.decisions.matmul_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr("hfkit.training.saving.draw_loss", lambda log, path: None)
    return there


def run(*options: str, recipe: str = RECIPE, code: int = 0) -> dict[str, Any]:
    assert cli.main(["run", recipe, *options]) == code
    folder = next((option.partition("=")[2] for option in options if option.startswith("output_dir=")), None)
    return json.loads((Path(folder or f"runs/{Path(recipe).stem}") / "metrics.json").read_text(encoding="utf-8"))


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


def matrices(folder: str) -> dict[str, torch.Tensor]:
    """The matrices of the layers."""
    return {name: each for name, each in weights(folder).items() if each.ndim == 2 and ".layers." in name}


def is_kept_alone(folder: str) -> bool:
    """Whether nothing is left of what served to make the folder."""
    names = {path.name for path in Path(folder).iterdir()}
    return not any(name.startswith(("pruned", "pruning", "checkpoint", ".", "hfkit.started")) for name in names)


# ---- the methods


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_masks_set_half_of_each_matrix_to_zero_and_nothing_else(
    recipe: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    found = run(f"pruning.method={method}", *(["calibration=null"] if method == "magnitude" else []))
    for name, each in matrices("runs/prune").items():
        assert (each == 0).sum().item() == each.numel() // 2, name
    assert found["zeros"] == pytest.approx(0.5) and len(matrices("runs/prune")) == 2 * 7
    after = weights("runs/prune")
    for name, each in weights("runs/pretrain").items():  # sparsegpt alone corrects what it keeps
        is_matrix = name in matrices("runs/prune")
        kept = (after[name] != 0) | (not is_matrix)
        assert torch.equal(each[kept], after[name][kept]) == (not is_matrix or method != "sparsegpt"), name
    sizes = [Path(f"runs/{name}/model.safetensors").stat().st_size for name in ("pretrain", "prune")]
    assert sizes[0] == sizes[1] and found["size_bytes"] <= found["base_size_bytes"] + 200  # the config's own words
    assert "50.0% of the matrices' weights are 0: sparse, same size, same speed" in capsys.readouterr().out
    assert is_kept_alone("runs/prune")


def test_two_of_four_are_zero_in_every_group(recipe: Path) -> None:
    run('pruning.sparsity="2:4"')
    for each in matrices("runs/prune").values():
        assert ((each.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()


def test_fewer_layers_are_a_model_like_any_other(recipe: Path) -> None:
    found = run(*DEPTH)
    model = AutoModelForCausalLM.from_pretrained("runs/prune")
    tokenizer, kept = AutoTokenizer.from_pretrained("runs/prune"), found["kept_layers"]
    assert model.config.num_hidden_layers == len(kept) == 1 and found["parameters"] < found["base_parameters"]
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(weights("runs/prune")[name.format(0)], weights("runs/pretrain")[name.format(kept[0])])
    ids = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**ids, max_new_tokens=4, min_new_tokens=4).shape[1] == ids["input_ids"].shape[1] + 4
    # It takes an adapter; that it takes eight bits is seen below.
    assert cli.main(["run", "recipes/finetune.yaml", "model=runs/prune"]) == 0
    config = json.loads(Path("runs/finetune/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "runs/prune"


def test_a_narrower_model(recipe: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    found = run(f"pruning={json.dumps({'method': 'width', **sizes})}")
    model = AutoModelForCausalLM.from_pretrained("runs/prune")
    assert {name: getattr(model.config, name) for name in sizes} == sizes == {name: found[name] for name in sizes}
    assert found["size_bytes"] < found["base_size_bytes"] and math.isfinite(found["bits_per_byte"])


def test_a_task_and_texts_that_fill_as_many_rows_as_the_recipe_says(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`calibration_rows` counts rows of tokens, not texts."""
    seen, prune = [], pruning.prune
    monkeypatch.setattr(pruning, "prune", lambda model, how, rows: (seen.append(rows), prune(model, how, rows))[1])
    found = run("task=generate", *TASK, "generation={max_new_tokens: 4}", "calibration_rows=20", recipe=RECOVER)
    assert seen[0].shape == (20, 32) and {"rougeL", "base_rougeL", "unrecovered_rougeL", "perplexity"} <= found.keys()


def test_an_adapter_is_merged_first(recipe: Path) -> None:
    assert cli.main(["run", "recipes/finetune.yaml", "merge=true"]) == 0
    found = run("model=runs/finetune", *MAGNITUDE)
    merged, pruned = matrices("runs/finetune/merged"), matrices("runs/prune")
    for name in pruned:
        kept = pruned[name] != 0
        assert torch.equal(pruned[name][kept], merged[name][kept])
    assert found["merge_drift"] < 1e-4 and found["base_size_bytes"] > found["size_bytes"]  # base and adapter
    assert is_kept_alone("runs/prune")


def test_a_classifier_is_pruned(recipe: Path) -> None:
    assert cli.main(["run", "recipes/classify.yaml"]) == 0
    of_task = ["task=classify", "label=topic", "prompt='{question}'", "data=tasks.yaml", "metrics=[accuracy]"]
    found = run("model=runs/classify", *of_task, "calibration=tasks.yaml")
    assert {"accuracy", "base_accuracy", "zeros"} <= found.keys()


# ---- limits, and recipes that name each other


def test_numbers_stand_beside_those_of_the_model_before(recipe: Path) -> None:
    limits = 'accept={bits_per_byte: "<= 1.5x base", parameters: "<= 1.0x base"}'
    found = run(limits, *MAGNITUDE)
    known = json.loads(Path("runs/pretrain/metrics.json").read_text(encoding="utf-8"))
    assert found["base_bits_per_byte"] == pytest.approx(known["bits_per_byte"], rel=0.05)  # windows, not packed rows
    expected = found["bits_per_byte"] - found["base_bits_per_byte"]
    assert found["bits_per_byte_difference"] == pytest.approx(expected, abs=1e-6)
    assert all(found[name] > 0 and found[f"base_{name}"] > 0 for name in ("tokens_per_second", "memory_bytes"))
    assert [(each["metric"], each["kept"]) for each in found["accept"]] == [
        ("bits_per_byte", True),
        ("parameters", True),
    ]
    strict = run('accept={bits_per_byte: "<= 0.1x base"}', *MAGNITUDE, "output_dir=runs/strict", code=3)
    assert not strict["accept"][0]["kept"] and Path("runs/strict/model.safetensors").exists()
    assert not Path("runs/strict/hfkit.json").exists()


def test_one_command_prunes_recovers_and_quantizes(recipe: Path) -> None:
    text = Path(RECOVER).read_text().replace("{method: sparsegpt, sparsity: 0.5}", "{method: depth, drop_layers: 1}")
    Path(RECOVER).write_text(text, encoding="utf-8")
    text = "stage: quantize\nmodel: recover.yaml\ndata: data.yaml\nquantization: {load_in_8bit: true}\n"
    Path("recipes/quantize.yaml").write_text(text, encoding="utf-8")
    found = run(recipe="recipes/quantize.yaml")
    assert is_kept_alone("runs/recover") and found["size_bytes"] < found["base_size_bytes"]
    recovered = json.loads(Path("runs/recover/metrics.json").read_text())
    assert found["base_bits_per_byte"] == pytest.approx(recovered["bits_per_byte"])


# ---- recovery


def test_a_recovery_from_the_model_before_lowers_the_loss(recipe: Path) -> None:
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=60", "output_dir=runs/longer"]) == 0
    narrow = ["model=runs/longer", "pruning={method: width, hidden_size: 16}", "train.max_steps=20"]
    found = run(*narrow, recipe=RECOVER)
    assert found["bits_per_byte"] < 0.9 * found["unrecovered_bits_per_byte"]
    assert found["base_bits_per_byte"] < found["unrecovered_bits_per_byte"]
    assert found["train_seconds"] > 0 and found["recovery_skipped_steps"] == 0
    assert is_kept_alone("runs/recover") and AutoModelForCausalLM.from_pretrained("runs/recover")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_masks_hold_while_the_rest_learns(recipe: Path, optimizer: str) -> None:
    run()
    found = run(f"recover.optimizer={optimizer}", recipe=RECOVER)
    pruned, recovered = matrices("runs/prune"), matrices("runs/recover")
    for name in pruned:
        assert torch.equal(pruned[name] == 0, recovered[name] == 0), name
        assert not torch.equal(pruned[name], recovered[name]), name
    assert found["zeros"] == pytest.approx(0.5) and found["unrecovered_bits_per_byte"] != found["bits_per_byte"]
    assert found["unrecovered_bits_per_byte"] == pytest.approx(
        json.loads(Path("runs/prune/metrics.json").read_text())["bits_per_byte"]
    )
    assert is_kept_alone("runs/recover")


def test_a_fine_tuning_loads_no_teacher(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "load_teacher", lambda *a: pytest.fail("a teacher was loaded"))
    run("recover.losses=[{loss: cross_entropy}]", recipe=RECOVER)
    log = [line for line in read_log(Path("runs/recover/metrics.jsonl")) if "loss" in line]
    assert len(log) == 4 and all((each == 0).float().mean() == 0.5 for each in matrices("runs/recover").values())


def test_an_interrupted_recovery_goes_on_and_prunes_no_second_time(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("output_dir=runs/whole", recipe=RECOVER)
    with at("on_step_end", 3, kill), pytest.raises(Killed):
        run("output_dir=runs/parts", recipe=RECOVER)
    assert Path("runs/parts/pruned/model.safetensors").exists() and not Path("runs/parts/hfkit.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "prune", lambda *a: pytest.fail("it was pruned again"))
        run("output_dir=runs/parts", recipe=RECOVER)
    digests = {manifest.sha256_of(Path(f"runs/{name}/model.safetensors")) for name in ("whole", "parts")}
    assert len(digests) == 1 and is_kept_alone("runs/parts")
    logs = [read_log(Path(f"runs/{name}/metrics.jsonl")) for name in ("whole", "parts")]
    lines = [[(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_what_another_recipe_had_pruned_is_not_taken(recipe: Path) -> None:
    """Killed before its first checkpoint, and the recipe changed: the half-made folder is of no use."""
    with at("on_step_end", 1, kill), pytest.raises(Killed):
        run(recipe=RECOVER)
    found = run("pruning.sparsity=0.75", recipe=RECOVER)
    assert found["zeros"] == pytest.approx(0.75)
    assert all((each == 0).float().mean() == 0.75 for each in matrices("runs/recover").values())


def test_two_processes_recover_with_masks_held(there: Path) -> None:
    """Under a launcher, where the models are measured in processes that are none of its own."""
    (there / RECOVER).write_text(PRUNE + TRAIN, encoding="utf-8")
    done = on_two("run", RECOVER, "train.use_cpu=true")
    assert done.returncode == 0, done.stderr
    assert "4 steps of 8 rows" in done.stdout and done.stdout.count("measuring recovered") == 1
    assert all((each == 0).float().mean() == 0.5 for each in matrices("runs/recover").values())


# ---- bad input


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["pruning.sparsity=1.5"], ["pruning", "sparsity=1.5: must be a share above 0 and below 1, or N:M"]),
        (["pruning.sparsity=0"], ["sparsity=0", "above 0 and below 1"]),
        (["pruning.sparsity=4:4"], ["pruning", "N:M with N from 1 to M - 1"]),
        (["pruning.sparsity=half"], ["sparsity=half", "must be a share"]),
        (["pruning={method: sparsegpt}"], ["method=sparsegpt: does not say how much to prune; set sparsity"]),
        (["pruning.method=sparsgpt"], ['did you mean "sparsegpt"?']),
        (["pruning.drop_layers=1"], ["drop_layers=1: sparsegpt takes sparsity; delete the key"]),
        ([*DEPTH, "pruning.sparsity=0.5"], ["sparsity=0.5: depth takes drop_layers, by"]),
        (["pruning={method: depth, drop_layers: 2}"], ["pruning.drop_layers", "below the model's 2 layers, got 2"]),
        (["pruning={method: width, hidden_size: 65}"], ["pruning.hidden_size", "from 1 to the model's 64, got 65"]),
        (["calibration=null"], ["calibration", "is missing; sparsegpt needs calibration data: name a data set"]),
        (["pruning.method=magnitude"], ["calibration", "magnitude uses no calibration data; delete the key"]),
        (["calibration_split=test"], ["calibration_split", "is the test split that the result is evaluated on"]),
        (["sequence_length=64"], ["sequence_length", "at most the model's 32 positions, got 64"]),
        (["recover={}"], ["recover", "add `train:` with max_steps or num_train_epochs"]),
        ([TWO_STEPS], ["train", "nothing is trained; add `recover: {}`, or delete the key"]),
        (["recover={}", TWO_STEPS, "task=classify"], ["recover", "classifiers are not recovered here"]),
        (["recover={losses: [{loss: jsd, weight: 0}]}", TWO_STEPS], ["the weights sum to 0"]),
        (["recover={losses: [{loss: uld}]}", TWO_STEPS], ["recover.losses.0", "use forward_kl"]),
        (["recover={losses: [{loss: attention, layers: [[0, 9]]}]}", TWO_STEPS], ["[0, 9]: the teacher has"]),
        (["task=generate", *TASK, "metrics=[length]"], ["metrics", "none says which model is better; add one of"]),
        (['accept={rougeL: ">= 1"}'], ["accept.rougeL", "is not measured here"]),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    messages: list[str],
) -> None:
    monkeypatch.setattr("hfkit.model.loading.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert cli.main(["run", RECIPE, *options]) == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told
    assert "Traceback" not in told and not Path("runs/prune").exists()


def test_models_that_cannot_be_pruned_are_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/pretrain", "runs/odd", ignore=shutil.ignore_patterns("hfkit.json"))
    sizes = {"hidden_size": 30, "intermediate_size": 30, "num_hidden_layers": 1, "num_attention_heads": 3}
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained("runs/odd")
    assert cli.main(["run", RECIPE, "model=runs/odd", 'pruning.sparsity="2:4"']) == 2
    told = capsys.readouterr().err
    assert "pruning.sparsity" in told and "a multiple of 4" in told and "has 30; use a share such as 0.5" in told
    config = json.loads(Path("runs/odd/config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    Path("runs/odd/config.json").write_text(json.dumps(quantized))
    assert cli.main(["run", RECIPE, "model=runs/odd"]) == 2
    assert "runs/odd: is quantized, and its weights cannot be pruned" in capsys.readouterr().err
    assert not Path("runs/prune").exists()
