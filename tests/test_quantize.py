"""Quantization: what is quantized and what stays whole, folders that load by themselves, and what bad input gets."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from hfkit.compression import calibration, quantization
from hfkit.data.tasks.classify import Classify
from hfkit.data.tasks.text import Text
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.model.loading import load_model
from hfkit.model.quantized import bitsandbytes_config
from hfkit.planning import parts
from hfkit.planning.work import Model
from tests.kit import inside
from tests.test_distill import DISTILL
from tests.test_evaluate import EVALUATE
from tests.test_finetune import problems, run

QUANTIZE = """\
stage: quantize
model: runs/pretrain
data: data.yaml
metrics: [bits_per_byte]
limit: 4
quantization: {load_in_8bit: true}
"""
RECIPE = "recipes/quantize.yaml"
INT8 = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SCHEMES = {"int8": INT8, "nf4": NF4}
MATRICES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
ALL = {f"model.layers.{layer}.{name}" for layer in range(2) for name in MATRICES}
IDS = torch.arange(10, 40)[None]
# The folder is all that it is given: the code of the model comes with it.
LOAD = """\
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.arange(10, 40)[None]).logits, sys.argv[2])
of_hook = {"hfkit", "hfkit.recipe_hook", "hfkit.version"}
assert not {name for name in sys.modules if name.split(".")[0] == "hfkit"} - of_hook
"""


@pytest.fixture(scope="module")
def quantized(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with the pretrained model in 8 and in 4 bit, made by the stage. To be read, not changed."""
    folder = tmp_path_factory.mktemp("quantize") / "world"
    shutil.copytree(prepared, folder)
    (folder / RECIPE).write_text(QUANTIZE, encoding="utf-8")
    with inside(folder):
        for name, scheme in SCHEMES.items():
            run(f"output_dir=runs/{name}", f"quantization={json.dumps(scheme)}", recipe=RECIPE)
    return folder


@pytest.fixture
def recipe(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that world, as the working directory."""
    folder = tmp_path / "quantized"
    shutil.copytree(quantized, folder)
    monkeypatch.chdir(folder)
    return folder


def quantize(place: str | Path, folder: str, scheme: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """The folder that the stage makes, without the measuring."""
    tokenizer = AutoTokenizer.from_pretrained("runs/pretrain")
    asked = {"method": "bitsandbytes", "options": scheme, "task": Text(), "texts": [], "trust_remote_code": False}
    return quantization.quantize(str(place), Path(folder), tokenizer=tokenizer, **{**asked, **keys})


@torch.no_grad()
def logits(place: str, has_classes: bool = False) -> torch.Tensor:
    return load_model(place, has_classes).eval()(IDS).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


def names_in(folder: str) -> set[str]:
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return set(file.keys())


# ---- the result


@pytest.mark.parametrize("name", SCHEMES)
def test_every_matrix_but_the_head_is_quantized_and_takes_what_is_promised(recipe: Path, name: str) -> None:
    folder = Path("runs", name)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    model: Any = load_model(str(folder))
    assert set(found["quantized_modules"]) == ALL and found["whole_modules"] == ["lm_head"]
    assert {key for key, module in model.named_modules() if "bitsandbytes" in type(module).__module__} == ALL
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16

    assert found["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["weight_bytes"] <= 1.02 * found["promised_bytes"]
    plain = Path("runs/pretrain/model.safetensors").stat().st_size
    assert found["weight_bytes"] < plain * (0.36 if name == "int8" else 0.26)  # the embeddings are a sixth
    assert "lm_head.weight" not in names_in(str(folder))  # tied: the embeddings stand there once
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert abs(found["bits_per_byte"] / found["base_bits_per_byte"] - 1) < 0.01


@pytest.mark.parametrize("name", SCHEMES)
def test_the_folder_loads_by_itself(recipe: Path, name: str) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(recipe / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOAD, f"runs/{name}", "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    there_, here = torch.load("logits.pt").float(), logits(f"runs/{name}")
    assert torch.equal(there_, here)
    assert 0 < difference(here, logits("runs/pretrain")) < 0.1 * logits("runs/pretrain").std()


def test_modules_to_skip_add_to_the_head(recipe: Path) -> None:
    found = quantize("runs/pretrain", "runs/some", {**INT8, "llm_int8_skip_modules": ["q_proj"]})
    queries = {f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    assert set(found["whole_modules"]) == {"lm_head", *queries} and set(found["quantized_modules"]) == ALL - queries
    model = load_model("runs/some")
    assert all(type(model.get_submodule(name)) is nn.Linear for name in found["whole_modules"])


def test_a_gpu_multiplies_four_bits_in_the_type_that_it_is_fast_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model, four_bits = (
        HfkitForCausalLM(HfkitConfig(vocab_size=64, hidden_size=64, num_attention_heads=4)),
        {"load_in_4bit": True},
    )
    assert bitsandbytes_config(four_bits, model).bnb_4bit_compute_dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for is_fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda is_fast=is_fast, **_: is_fast)
        assert bitsandbytes_config(four_bits, model).bnb_4bit_compute_dtype == dtype
        told = {**four_bits, "bnb_4bit_compute_dtype": "float16"}
        assert bitsandbytes_config(told, model).bnb_4bit_compute_dtype == torch.float16


def test_packed_numbers_of_a_floating_type_count_as_quantized(recipe: Path) -> None:
    found = quantize("runs/pretrain", "runs/stored", {**NF4, "bnb_4bit_quant_storage": "bfloat16"})
    assert set(found["quantized_modules"]) == ALL


def test_an_adapter_is_merged_first(recipe: Path) -> None:
    run("merge=true", "output_dir=runs/tuned")
    found = run("model=runs/tuned", "output_dir=runs/q", recipe=RECIPE)
    merged = logits("runs/tuned/merged")
    assert found["merge_drift"] < 1e-4
    assert difference(logits("runs/q"), merged) < 0.2 * difference(logits("runs/pretrain"), merged)
    assert AutoConfig.from_pretrained("runs/q").quantization_config["load_in_8bit"]
    assert not any(path.name.startswith(".merged") for path in Path("runs/q").iterdir())


def test_an_adapter_on_the_folder_is_merged_into_what_it_dequantizes_to(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("model=runs/nf4", "merge=true", "output_dir=runs/tuned")
    assert found["merge_drift"] < 0.5  # of the effect of four steps, between kernels that round differently
    merged = load_model("runs/tuned/merged")
    assert getattr(merged.config, "quantization_config", None) is None
    assert {tensor.dtype for tensor in merged.parameters()} == {torch.float32}
    told = problems(capsys, "model=runs/nf4", "lora=null", "output_dir=runs/all")
    assert "quantized weights cannot be trained; add `lora: {}`" in told


def test_the_head_of_a_classifier_stays_whole(recipe: Path) -> None:
    torch.manual_seed(0)
    model = load_model("runs/pretrain", True, labels=["animal", "other"])
    model.save_pretrained("runs/classes")
    found = quantize("runs/classes", "runs/q", INT8, task=Classify())
    assert found["whole_modules"] == ["score"] and set(found["quantized_modules"]) == ALL
    made: Any = load_model("runs/q", True)
    assert type(made.score) is nn.Linear and made.config.id2label == {0: "animal", 1: "other"}
    assert torch.equal(made.score.weight, model.score.weight.bfloat16())  # type: ignore[union-attr]
    plain = logits("runs/classes", True)
    assert difference(logits("runs/q", True), plain) < 0.1 * plain.abs().mean()


def test_a_stock_model_with_a_head_of_its_own(recipe: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=320, tie_word_embeddings=False, **sizes)).eval()
    stock.save_pretrained("runs/stock")
    found = quantize("runs/stock", "runs/q", NF4)
    assert set(found["quantized_modules"]) == ALL and "lm_head.weight" in names_in("runs/q")
    made = AutoModelForCausalLM.from_pretrained("runs/q").eval()
    assert type(made) is LlamaForCausalLM and torch.equal(made.lm_head.weight, stock.lm_head.weight.bfloat16())
    with torch.no_grad():
        plain, here = stock(IDS).logits, made(IDS).logits.float()
    assert difference(here, plain) < 0.3 * plain.std()


@pytest.fixture
def gpt2(recipe: Path) -> str:
    """A model whose matrices are `Conv1D`, (inputs, outputs)."""
    tokenizer = AutoTokenizer.from_pretrained("runs/pretrain")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**sizes, **ids)).save_pretrained("runs/gpt2")
    tokenizer.save_pretrained("runs/gpt2")
    return "runs/gpt2"


@pytest.mark.parametrize("name", SCHEMES)
def test_conv1d_is_quantized_like_any_matrix(gpt2: str, name: str) -> None:
    facts = quantize(gpt2, "runs/small", SCHEMES[name])
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert set(facts["quantized_modules"]) == {f"transformer.h.{layer}.{each}" for layer in range(2) for each in names}
    assert facts["whole_modules"] == ["lm_head"]
    assert facts["promised_bytes"] * 0.9 < facts["weight_bytes"] <= facts["promised_bytes"] * 1.02
    model = Model(AutoConfig.from_pretrained(gpt2), None, method="bitsandbytes", quantization=SCHEMES[name])
    assert parts.weight_bytes(model) == facts["promised_bytes"]
    assert difference(logits("runs/small"), logits(gpt2)) < 0.15 * logits(gpt2).std().item()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_dequantized_conv1d_is_saved_as_what_it_was(gpt2: str, name: str) -> None:
    quantize(gpt2, "runs/small", SCHEMES[name])
    load_model("runs/small", dequantize=True).save_pretrained("runs/whole")
    assert AutoConfig.from_pretrained("runs/whole").to_dict().get("quantization_config") is None
    assert difference(logits("runs/whole"), logits(gpt2)) < 0.15 * logits(gpt2).std().item()


def test_a_method_that_leaves_conv1d_whole_is_refused_before(gpt2: str) -> None:
    assert [*quantization.problems_with("runs/pretrain", "torchao", {}, False, False)] == []
    rule = "torchao takes nn.Linear alone, and beside its head a model of type gpt2 has Conv1D; use bitsandbytes"
    assert [*quantization.problems_with(gpt2, "torchao", {}, False, False)] == [("method", rule)]


def test_evaluate_and_distill_take_the_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes/evaluate.yaml").write_text(EVALUATE.replace("runs/pretrain", "runs/nf4"), encoding="utf-8")
    of_text = ["task=text", "data=data.yaml", "metrics=[bits_per_byte]", "limit=4"]
    found = run(*of_text, recipe="recipes/evaluate.yaml")
    known = json.loads(Path("runs/nf4/metrics.json").read_text(encoding="utf-8"))
    assert found["bits_per_byte"] == pytest.approx(known["bits_per_byte"], rel=1e-4)

    Path("recipes/distill.yaml").write_text(DISTILL.replace("runs/pretrain", "runs/nf4"), encoding="utf-8")
    found = run("baseline=false", recipe="recipes/distill.yaml")
    plain = json.loads(Path("runs/pretrain/metrics.json").read_text(encoding="utf-8"))
    assert found["teacher_bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=0.01)
    assert load_model("runs/distill").config.hidden_size == 32
    told = problems(capsys, "student=runs/nf4", "output_dir=runs/no", recipe="recipes/distill.yaml")
    assert "quantized weights cannot be trained" in told


# ---- bad input


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["model=runs/nf4"], ["model", "runs/nf4: is quantized already; name the model that it was made from"]),
        (["quantization={}"], ["quantization", "either load_in_8bit: true or load_in_4bit: true"]),
        (["quantization.load_in_4bit=true"], ["quantization", "load_in_4bit and load_in_8bit are both True"]),
        (["quantization.bnb_4bit_quant_typ=nf4"], ["unknown key", 'did you mean "bnb_4bit_quant_type"?']),
        (
            ["quantization={load_in_4bit: true, bnb_4bit_quant_type: nf3}"],
            ["quantization.bnb_4bit_quant_type", "must be nf4 or fp4, got 'nf3'"],
        ),
        (
            ["method=hqq", "quantization={nbits: 4}"],
            ["hqq: transformers", "makes no such models; use bitsandbytes, torchao"],
        ),
        (
            ["method=awq", "quantization={bits: 4}"],
            ["awq: transformers", "makes no such models; use bitsandbytes, torchao"],
        ),
        (["method=gptq", "quantization={bits: 4}"], ["calibration", "is missing; gptq needs calibration data"]),
        (["calibration=runs/data"], ["calibration", "bitsandbytes uses no calibration data; delete the key"]),
        (
            ["method=gptq", "quantization={bits: 4}", "calibration=data.yaml", "calibration_split=test"],
            ["calibration_split", "is the test split that the result is evaluated on; calibrate on another"],
        ),
        (
            ["method=gptq", "quantization={bits: 4}", "calibration=runs/tasks"],
            ["calibration", "the data has no column 'text'"],
        ),
        (['accept.rougeL=">= 0.5"'], ["accept.rougeL", "is not measured here, known: bits_per_byte"]),
    ],
)
def test_a_mistake_is_told_before_a_weight_is_loaded(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    messages: Any,
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    told = problems(capsys, *options, recipe=RECIPE)
    assert all(message in told for message in messages), told
    assert "Traceback" not in told and not list(Path("runs").glob("*quantize*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes such sizes")
def test_four_bits_on_a_cpu_need_sizes_that_blocks_fill(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = HfkitConfig(vocab_size=320, hidden_size=96, num_hidden_layers=1, num_attention_heads=4)
    HfkitForCausalLM(config).save_pretrained("runs/odd")
    for path in Path("runs/pretrain").glob("tokenizer*"):
        shutil.copy(path, "runs/odd")
    told = problems(capsys, "model=runs/odd", f"quantization={json.dumps(NF4)}", recipe=RECIPE)
    assert "q_proj has 96 inputs, and 4-bit weights on this CPU need a multiple of 64; use load_in_8bit" in told
    assert not Path("runs/quantize").exists()


@pytest.mark.parametrize("method", ["gptq", "torchao"])
def test_a_library_that_is_not_there_is_named(recipe: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    if all(importlib.util.find_spec(name) for name in quantization.PACKAGES[method]):
        pytest.skip(f"{method} is installed")
    scheme = "{bits: 4}" if method == "gptq" else "{quant_type: Int8WeightOnlyConfig}"
    told = problems(capsys, f"method={method}", f"quantization={scheme}", recipe=RECIPE)
    assert f"{method}: needs" in told and f"pip install 'hfkit[{method}]'" in told


def test_texts_of_the_evaluation_are_no_calibration(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under whatever name: another folder, whose training split is the test split of this one."""
    shutil.copytree("runs/data", "runs/other")
    shutil.copy("runs/data/test.parquet", "runs/other/train.parquet")
    monkeypatch.setattr(quantization, "PACKAGES", {})  # as if gptq were there
    options = ["method=gptq", "quantization={bits: 4}", "calibration=runs/other"]
    told = problems(capsys, *options, recipe=RECIPE)
    assert "of the train split of runs/other" in told and "evaluated on; choose others" in told
    assert not Path("runs/quantize").exists()

    rows = [{"text": "another text"}]
    assert len(list(calibration.texts_of(Text(), "runs/other", "train", rows))) > 4


# ---- other libraries


def test_torchao_quantizes_and_loads(recipe: Path) -> None:
    torchao = pytest.importorskip("torchao")
    told = list(quantization.problems("torchao", {"quant_type": "Int8WeightOnlyConfg"}))
    assert told == [
        (
            "quantization.quant_type",
            "'Int8WeightOnlyConfg': torchao has no such class, did you mean \"Int8WeightOnlyConfig\"?",
        )
    ]
    scheme = {"quant_type": "Int8WeightOnlyConfig"}
    assert list(quantization.problems("torchao", scheme)) == []
    found = quantize("runs/pretrain", "runs/q", scheme, method="torchao")
    assert set(found["quantized_modules"]) == ALL and found["whole_modules"] == ["lm_head"]
    kind = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    model: Any = load_model("runs/pretrain", dtype=torch.bfloat16, quantization=kind)
    with torch.no_grad():
        assert torch.equal(logits("runs/q"), model.eval()(IDS).logits.float())
    assert 0 < difference(logits("runs/q"), logits("runs/pretrain")) < 0.1 * logits("runs/pretrain").std()
    with pytest.raises(HfkitError, match="quantization: .*groupsize.*; correct the arguments of torchao"):
        quantize("runs/pretrain", "runs/bad", {**scheme, "arguments": {"groupsize": 1}}, method="torchao")


def test_gptq_quantizes_and_loads(recipe: Path) -> None:
    """Slow: gptqmodel compiles its kernels first."""
    pytest.importorskip("gptqmodel")
    texts = ["the cat sees the red dog under the tree and the river finds the small cat again. " * 3] * 8
    found = quantize("runs/pretrain", "runs/q", {"bits": 4, "group_size": 32}, method="gptq", texts=texts)
    assert set(found["quantized_modules"]) == ALL and found["whole_modules"] == ["lm_head"]
    assert "the cat" not in Path("runs/q/config.json").read_text(encoding="utf-8")
    assert difference(logits("runs/q"), logits("runs/pretrain")) < 0.3 * logits("runs/pretrain").std()
