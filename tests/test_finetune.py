"""Fine-tuning: what is learned, what is left alone, what is saved, and what bad input gets."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.data.rows.examples import Examples, PackedExamples, best_fit, pad
from hfkit.data.rows.packing import IGNORED
from hfkit.data.tasks.generate import Generate
from hfkit.data.tasks.templates import fill
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForCausalLM, adapters
from hfkit.model.loading import load_model
from hfkit.training.callbacks import read_log
from tests.kit import on_two
from tests.toy import WORDS

TASKS = """\
stage: prepare
columns: {question: text, answer: text, topic: label, messages: messages}
sources:
  - files: tasks.jsonl
split: {validation: 0.1, test: 0.1}
"""
FINETUNE = """\
stage: finetune
model: pretrain.yaml
data: tasks.yaml
task: generate
prompt: "{question} ->"
completion: " {answer}"
sequence_length: 32
lora: {r: 4}
train:
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  logging_steps: 1
  save_steps: 2
  torch_compile: false
  bf16: false
"""
RECIPE = "recipes/finetune.yaml"
FULL = "lora=null"

ADAPTED = "runs/finetune"


def row(number: int) -> dict[str, Any]:
    random.seed(number)
    question = " ".join(random.choices(WORDS, k=random.randint(3, 12)))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": question.split()[0]}]
    topic = "animal" if {"cat", "dog"} & set(question.split()) else "other"
    return {"question": question, "answer": question.split()[0], "topic": topic, "messages": turns}


def write_tasks(folder: Path) -> None:
    lines = "\n".join(json.dumps(row(number)) for number in range(200))
    (folder / "tasks.jsonl").write_text(lines, encoding="utf-8")
    (folder / "recipes/tasks.yaml").write_text(TASKS, encoding="utf-8")
    (folder / RECIPE).write_text(FINETUNE, encoding="utf-8")
    text = FINETUNE.replace("task: generate", "task: classify\nlabel: topic").replace(
        '"{question} ->"', '"{question}"'
    )
    text = text.replace('completion: " {answer}"\n', "").replace("lora: {r: 4}\n", "")
    (folder / "recipes/classify.yaml").write_text(text, encoding="utf-8")


def run(*options: str, recipe: str = RECIPE) -> dict[str, Any]:
    assert cli.main(["run", recipe, *options]) == 0
    folder = next((option.partition("=")[2] for option in options if option.startswith("output_dir=")), None)
    return json.loads((Path(folder or f"runs/{Path(recipe).stem}") / "metrics.json").read_text(encoding="utf-8"))


def problems(capsys: pytest.CaptureFixture[str], *options: str, recipe: str = RECIPE) -> str:
    capsys.readouterr()
    assert cli.main(["run", recipe, *options]) == 2
    return capsys.readouterr().err


# ---- training


def test_what_is_up_to_date_loads_no_library(there: Path) -> None:
    """Nor does it hide a mistake: a section that was changed is checked by its own class."""
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys; from hfkit import cli; assert not cli.main(sys.argv[1:]); assert not {heavy}, {heavy}"
    command = [sys.executable, "-c", code, "run", "recipes/pretrain.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "up to date" in done.stdout, done.stderr
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_stepz=3"]) == 2


def test_an_adapter_is_trained_and_its_base_left_alone(there: Path) -> None:
    before = manifest.sha256_of(Path("runs/pretrain/model.safetensors"))
    found = run("merge=true", "train.eval_strategy=steps", "train.eval_steps=2")
    assert manifest.sha256_of(Path("runs/pretrain/model.safetensors")) == before
    names = {path.name for path in Path("runs/finetune").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "merged"}
    assert "model.safetensors" not in names and not any(name.startswith("checkpoint") for name in names)

    adapted = load_model("runs/finetune")
    moved = {name: tensor for name, tensor in adapted.named_parameters() if "lora_B" in name}
    assert len(moved) == 2 * 7 and all(tensor.abs().sum() > 0 for tensor in moved.values())  # every linear layer
    base = load_model("runs/pretrain").state_dict()
    for name, tensor in adapted.base_model.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name

    evaluated = [line for line in read_log(Path("runs/finetune/metrics.jsonl")) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert all({"eval_rougeL", "eval_bleu", "eval_exact_match"} <= line.keys() for line in evaluated)
    assert {"rouge1", "rougeL", "bleu", "exact_match", "loss", "perplexity"} <= found.keys()
    card = Path("runs/finetune/README.md").read_text(encoding="utf-8")
    digest = (manifest.read_json(Path("runs/pretrain")) or {})["digest"]
    assert f"model: runs/pretrain  pretrain  sha256 {digest[:12]}" in card and "library_name: peft" in card


def test_merged_weights_are_a_model_like_any_other(there: Path) -> None:
    found = run("merge=true")
    assert found["merge_drift"] < 1e-4
    ids = torch.randint(10, 300, (2, 20))
    merged = AutoModelForCausalLM.from_pretrained("runs/finetune/merged").eval()
    adapted = load_model("runs/finetune").eval()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained("runs/finetune/merged")) == 320


@pytest.mark.parametrize(
    "lora",
    [
        "{target_modules: [q_proj, lm_head]}",
        "{target_modules: [q_proj, embed_tokens]}",
        "{target_modules: [q_proj], modules_to_save: [lm_head]}",
        "{target_modules: [q_proj], modules_to_save: [embed_tokens]}",
        "{target_modules: [q_proj], trainable_token_indices: [20, 30, 40]}",
        "{target_modules: [q_proj]}",
    ],
)
def test_an_adapter_on_one_of_two_tied_matrices_parts_them_where_it_is_merged(there: Path, lora: str) -> None:
    assert AutoConfig.from_pretrained("runs/pretrain").tie_word_embeddings
    found = run("merge=true", f"lora={lora}")
    assert found["merge_drift"] < 1e-4
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        expected, logits = (load_model(place).eval()(ids).logits for place in (ADAPTED, f"{ADAPTED}/merged"))
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    stay_tied = ("{target_modules: [q_proj]}", "{target_modules: [q_proj], trainable_token_indices: [20, 30, 40]}")
    assert AutoConfig.from_pretrained(f"{ADAPTED}/merged").tie_word_embeddings == (lora in stay_tied)


def test_a_merged_model_that_is_another_one_is_an_error(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "merged", lambda adapted: adapted.unload())
    told = problems(capsys, "merge=true")
    assert "the merged model is not the one that was trained: its logits are off by 1 of what the adapter" in told
    assert f"The adapter is whole, in {ADAPTED}" in told
    assert (Path(ADAPTED) / "adapter_model.safetensors").is_file() and not (Path(ADAPTED) / "merged").exists()


@pytest.mark.parametrize("bits", ["quantization.load_in_4bit=true", "quantization.load_in_8bit=true"])
def test_qlora_trains_merges_and_loads_on_a_cpu(there: Path, bits: str) -> None:
    found = run(bits, "quantization.bnb_4bit_quant_type=nf4", "merge=true")
    assert found["merge_drift"] < 0.5  # of the effect of four steps, between kernels that round differently
    merged = AutoModelForCausalLM.from_pretrained("runs/finetune/merged")
    assert {tensor.dtype for tensor in merged.parameters()} == {torch.float32}


def test_an_evaluation_changes_no_gradient_of_qlora(tmp_path: Path) -> None:
    """On processors with bfloat16 instructions bitsandbytes packs weights when they are evaluated."""
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    HfkitForCausalLM(HfkitConfig(vocab_size=64, hidden_size=64, **heads)).save_pretrained(tmp_path)
    base = load_model(str(tmp_path), dtype=torch.float32, quantization={"load_in_4bit": True})
    model = adapters.adapt(base, {"r": 4, "init_lora_weights": False}, has_classes=False, is_quantized=True)
    ids, gradients = torch.arange(24).view(2, 12), []
    for _ in range(2):
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append([each.grad for each in model.parameters() if each.requires_grad])
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert_close(*gradients)


def test_all_weights_are_trained_without_lora(there: Path) -> None:
    run(FULL)
    tuned, base = load_model("runs/finetune").state_dict(), load_model("runs/pretrain").state_dict()
    assert tuned.keys() == base.keys() and not any(torch.equal(tuned[name], base[name]) for name in base)


def test_an_interrupted_adapter_ends_where_a_whole_one_does(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfkit.training.callbacks import MetricsFile

    class Killed(BaseException):
        pass

    def kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Killed

    options = ["lora.lora_dropout=0.1", "train.eval_strategy=steps", "train.eval_steps=2"]
    run(*options, "output_dir=runs/whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsFile, "on_step_end", kill)
        run(*options, "output_dir=runs/parts")
    run(*options, "output_dir=runs/parts")
    digests = {manifest.sha256_of(Path(f"runs/{name}/adapter_model.safetensors")) for name in ("whole", "parts")}
    assert len(digests) == 1
    logs = [read_log(Path(f"runs/{name}/metrics.jsonl")) for name in ("whole", "parts")]
    lines = [[(each["step"], each.get("loss"), each.get("eval_rougeL")) for each in log] for log in logs]
    assert lines[0] == lines[1]


def test_an_adapter_on_two_processes_goes_on_exactly(there: Path) -> None:
    """A signal to one of them in step 3: both commit, and the run ends as one that was never stopped."""
    options = ["train.use_cpu=true", "lora.lora_dropout=0.1", "train.max_steps=6"]
    script = str(Path(__file__).with_name("interrupting.py"))

    def start(step: int, output: str) -> subprocess.CompletedProcess[str]:
        return on_two(script, str(step), "run", RECIPE, *options, f"output_dir=runs/{output}")

    whole = start(99, "whole")
    assert whole.returncode == 0, whole.stderr
    assert "the checkpoint of step 3 is committed" in start(3, "parts").stderr
    assert "resuming from runs/parts/checkpoint-3" in start(99, "parts").stdout
    digests = {manifest.sha256_of(Path(f"runs/{name}/adapter_model.safetensors")) for name in ("whole", "parts")}
    assert len(digests) == 1
    logs = [read_log(Path(f"runs/{name}/metrics.jsonl")) for name in ("whole", "parts")]
    lines = [[(each["step"], each["loss"], each["grad_norm"]) for each in log] for log in logs]
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_a_classifier_knows_the_names_of_its_classes(there: Path) -> None:
    options = ["train.max_steps=80", "train.learning_rate=3e-3", "train.eval_strategy=epoch"]
    found = run(*options, recipe="recipes/classify.yaml")
    assert found["accuracy"] > 0.8 and 0 < found["f1"] <= 1
    config = json.loads(Path("runs/classify/config.json").read_text())
    assert config["id2label"] == {"0": "animal", "1": "other"} and config["label2id"] == {"animal": 0, "other": 1}
    model = load_model("runs/classify", has_classes=True).eval()
    tokenizer = AutoTokenizer.from_pretrained("runs/classify")
    with torch.no_grad():
        logits = model(**tokenizer("the cat and the dog", return_tensors="pt", return_token_type_ids=False)).logits
    assert logits.shape == (1, 2)


def test_the_best_by_a_metric_of_the_task_is_kept(there: Path) -> None:
    options = ["train.eval_strategy=steps", "train.eval_steps=2", "train.load_best_model_at_end=true"]
    run(*options, "train.metric_for_best_model=rougeL", "train.greater_is_better=true")
    assert Path("runs/finetune/adapter_model.safetensors").exists()


# ---- examples


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Any:
    return AutoTokenizer.from_pretrained(prepared / "runs/pretrain")


def test_the_completion_and_its_end_are_learned_and_nothing_else(tokenizer: Any) -> None:
    task = Generate(prompt="{question} ->", completion=" {answer}")
    (example,) = task.encode({"question": "the red cat", "answer": "the"}, tokenizer, 32)
    assert not example.is_cut
    learned = [each for each, is_learned in zip(example.ids, example.learned, strict=True) if is_learned]
    assert tokenizer.decode(learned) == " the<eos>"
    assert tokenizer.decode(example.ids) == "<bos>the red cat -> the<eos>"


def test_the_longest_column_of_the_prompt_is_cut_at_its_end(tokenizer: Any) -> None:
    task = Generate(prompt="{a} and {b} ->", completion=" {c}")
    values = {"a": "red cat", "b": "green tree " * 30, "c": "river river"}
    (example,) = task.encode(values, tokenizer, 24)
    assert example.is_cut and 20 <= len(example.ids) <= 24
    text = tokenizer.decode(example.ids)
    assert text.startswith("<bos>red cat and green tree green") and text.endswith(" -> river river<eos>")
    assert task.encode({**values, "c": "river " * 40}, tokenizer, 24) == []  # the completion is never cut
    assert Generate(prompt="the " * 40 + "{a}").prompt_ids(values, tokenizer, 24) == ([], True)


def test_examples_of_a_row_do_not_see_each_other(prepared: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The sum of the losses of packed examples is that of the examples alone."""
    from hfkit.data.rows.examples import task_examples

    task = Generate(prompt="{question} ->", completion=" {answer}")
    folder = task_examples(str(prepared / "runs/tasks"), task, tokenizer, 32, tmp_path)
    examples = Examples(folder, "validation")
    packed = PackedExamples(examples, 32, tokenizer.pad_token_id)
    assert 1 < len(packed) < len(examples)
    model = AutoModelForCausalLM.from_pretrained(prepared / "runs/pretrain").eval()

    def nats(batch: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return model(**batch, num_items_in_batch=1).loss.item()

    alone = sum(nats(pad([examples[index]], tokenizer.pad_token_id)) for index in range(len(examples)))
    together = sum(nats({key: value[None] for key, value in packed[index].items()}) for index in range(len(packed)))
    assert together == pytest.approx(alone, rel=1e-4)
    learned = sum(int((packed[index]["labels"] != IGNORED).sum()) for index in range(len(packed)))
    assert learned == examples.counts["learned_tokens"]


def test_best_fit_packs_every_piece_once_and_tightly() -> None:
    random.seed(0)
    lengths = [random.randint(1, 60) for _ in range(500)]
    rows = best_fit(lengths, 64)
    assert sorted(index for each in rows for index in each) == list(range(500))
    assert all(sum(lengths[index] for index in each) <= 64 for each in rows)
    assert len(rows) <= sum(lengths) / 64 * 1.05 + 1


def test_a_template_is_filled_and_braces_are_doubled() -> None:
    assert fill("{{x}} {a}: {b}", {"a": "one", "b": ["two", "three"]}) == "{x} one: two"


# ---- bad input


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (['prompt="{qestion}"'], ["prompt", "no column 'qestion', did you mean \"question\"?"]),
        (['completion="{answr}"'], ["completion", 'did you mean "answer"?']),
        (["completion=yes"], ["completion", "names no column"]),
        (['prompt="{question"'], ["prompt", "is not a template"]),
        (["task=chat", "messages=chats"], ["messages", "no column 'chats', known: answer, messages"]),
        (["sequence_length=64"], ["sequence_length", "must be at most the model's 32 positions, got 64"]),
        (["lora.rank=4"], ["lora.rank=4: unknown key"]),
        ([FULL, "quantization.load_in_4bit=true"], ["quantization", "add `lora: {}`"]),
        ([FULL, "merge=true"], ["merge", "there is no adapter to merge"]),
        (["task=classify", "optimizer=muon"], ["optimizer", "classes are learned with adamw"]),
        (["model=runs/nothere"], ["model", "no such folder"]),
        (["model=runs/tasks"], ["model", "is a data set, but model must be a model"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    there: Path, capsys: pytest.CaptureFixture[str], options: list[str], messages: list[str]
) -> None:
    told = problems(capsys, *options)
    assert all(message in told for message in messages), told
    assert "Traceback" not in told and not Path("runs/finetune").exists()


def test_a_class_that_training_never_sees_is_told(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
    for index, each in enumerate(rows):
        each["topic"] = f"class {index}"
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = problems(capsys, "--rebuild", recipe="recipes/classify.yaml")
    assert "classes that training never sees: class" in told


def test_completions_that_never_fit_are_an_error(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = problems(capsys, f'completion="{"{question} " * 9}"', "sequence_length=8")
    assert "leaves nothing to learn" in told and "raise sequence_length" in told


def test_an_adapter_is_held_to_the_base_it_was_trained_on(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert "is an adapter; train it with `merge: true`" in problems(capsys, "model=runs/finetune", "output_dir=runs/x")
    made = manifest.read_json(Path("runs/pretrain")) or {}
    manifest.write_json(Path("runs/pretrain/hfkit.json"), {**made, "digest": "0" * 64})
    with pytest.raises(HfkitError, match="was trained on another base model than runs/pretrain is now"):
        load_model("runs/finetune")
    Path("runs/pretrain").rename("runs/moved")
    with pytest.raises(HfkitError, match="its base model runs/pretrain is not there; put it back"):
        load_model("runs/finetune")


def test_weights_that_are_missing_or_left_over_are_errors(there: Path) -> None:
    from safetensors.torch import load_file, save_file

    run()
    weights = load_file("runs/finetune/adapter_model.safetensors")
    name = next(iter(weights))
    for changed, message in (
        ({key: value for key, value in weights.items() if key != name}, "1 weights are missing: "),
        (
            {**weights, name.replace("layers.0", "layers.9"): weights[name].clone()},
            "1 weights have no place in the model",
        ),
    ):
        save_file(changed, "runs/finetune/adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(HfkitError, match=message):
            load_model("runs/finetune")
    weights = load_file("runs/pretrain/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, "runs/pretrain/model.safetensors", {"format": "pt"})
    with pytest.raises(HfkitError, match="1 weights are missing: model.norm.weight"):
        load_model("runs/pretrain")
