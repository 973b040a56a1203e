"""Distillation: what each source of targets teaches, what is reported, and what bad input gets."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.data.rows.packing import IGNORED
from hfkit.distillation import report
from hfkit.distillation.objective import Objective
from hfkit.distillation.settings import Loss, spread
from hfkit.distillation.teacher import Teacher
from hfkit.distillation.trainer import DistillationTrainer
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.model.heads import compute_loss_with
from hfkit.training.callbacks import read_log
from hfkit.training.trainer import training_arguments
from tests.kit import on_two

DISTILL = """\
stage: distill
teacher: runs/pretrain
data: data.yaml
student:
  hidden_size: 32
  num_hidden_layers: 1
  num_attention_heads: 2
sequence_length: 32
losses:
  - {loss: forward_kl, weight: 0.5}
  - {loss: cross_entropy, weight: 0.5}
train:
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  logging_steps: 1
  save_steps: 2
  torch_compile: false
  bf16: false
"""
RECIPE = "recipes/distill.yaml"
TASK = ["task=generate", "data=runs/tasks", "prompt='{question} ->'", "completion='{answer}'"]
KL = "losses=[{loss: forward_kl}]"


@pytest.fixture
def recipe(there: Path) -> Path:
    (there / RECIPE).write_text(DISTILL, encoding="utf-8")
    return there


def run(*options: str) -> dict[str, Any]:
    assert cli.main(["run", RECIPE, *options]) == 0
    folder = next((option.partition("=")[2] for option in options if option.startswith("output_dir=")), "runs/distill")
    return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))


def losses(folder: str = "runs/distill") -> list[float]:
    return [line["loss"] for line in read_log(Path(folder) / "metrics.jsonl") if "loss" in line]


# ---- the result


def test_the_report_says_what_the_teacher_was_worth(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run()
    shown = capsys.readouterr().out
    assert found["gap_closed"] == pytest.approx(
        (found["alone_bits_per_byte"] - found["bits_per_byte"])
        / (found["alone_bits_per_byte"] - found["teacher_bits_per_byte"])
    )
    assert found["retention"] == pytest.approx(found["teacher_bits_per_byte"] / found["bits_per_byte"])
    assert found["teacher_loss"] == pytest.approx(
        json.loads(Path("runs/pretrain/metrics.json").read_text())["loss"], rel=1e-5
    )
    for words in ("teacher", "student", "without teacher", "retention", "gap_closed"):
        assert words in shown
    # A plain folder: the student alone, nothing of its training.
    model = AutoModelForCausalLM.from_pretrained("runs/distill")
    assert model.config.hidden_size == 32 and model.num_parameters() == found["parameters"]
    assert {path.name for path in Path("runs/distill").iterdir()} >= {"README.md", "loss.png", "tokenizer.json"}
    assert not (Path("runs/distill") / report.ALONE).exists()
    assert cli.main(["run", RECIPE]) == 0 and "up to date" in capsys.readouterr().out


def test_a_teacher_helps(recipe: Path) -> None:
    """On the same tokens, distillation ends below cross-entropy alone."""
    Path("runs/pretrain").rename("runs/short")
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=300", "train.save_strategy=no"]) == 0
    found = run("losses.0.weight=0.9", "losses.1.weight=0.1", "train.max_steps=60", "train.save_strategy=no")
    assert found["teacher_loss"] < found["loss"] < found["alone_loss"] and found["gap_closed"] > 0


def test_the_student_alone_is_what_pretrain_makes(recipe: Path) -> None:
    """Same weights, rows and order: the comparison is with the training that one would have run instead."""
    found = run()
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
    assert cli.main(["run", "recipes/pretrain.yaml", *small, "tokenizer=runs/tokenizer", "output_dir=runs/small"]) == 0
    assert json.loads(Path("runs/small/metrics.json").read_text())["loss"] == pytest.approx(found["alone_loss"])


def test_an_interrupted_distillation_ends_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("output_dir=runs/whole")
    from hfkit.distillation.trainer import DistillationTrainer

    step = DistillationTrainer.training_step
    calls = []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", failing)
    assert cli.main(["run", RECIPE]) == 75
    monkeypatch.setattr(DistillationTrainer, "training_step", step)
    parts = run()
    assert [whole[key] for key in ("loss", "alone_loss", "gap_closed")] == [
        parts[key] for key in ("loss", "alone_loss", "gap_closed")
    ]
    assert losses("runs/whole") == losses()
    one, other = (load_file(f"runs/{name}/model.safetensors") for name in ("whole", "distill"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- the objective


def objective_of(*terms: Loss, attn: str = "sdpa") -> tuple[Any, Any, Objective]:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "max_position_embeddings": 16, "residual_initialization": "normal", "pad_token_id": 0}
    large = HfkitForCausalLM(
        HfkitConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.3, **shape)
    )
    small = HfkitForCausalLM(
        HfkitConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, **shape)
    )
    for model in (large, small):
        model.set_attn_implementation(attn)
    objective = Objective(list(terms), small, large.config, 50, compiled=False)
    compute_loss_with(small, objective)
    return small.train(), Teacher(large, objective.watched(1), objective.options()), objective


def batch_of(rows: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, tokens), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(tokens).repeat(rows, 1)
    positions[0] = torch.arange(tokens) % 5  # three documents in the first row
    labels = ids.masked_fill(positions == 0, IGNORED)
    labels[1, :6] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def loss_of(student: Any, objective: Objective, asked: Teacher, batch: dict[str, torch.Tensor], items: Any) -> Any:
    objective.prepare(batch, asked)
    return student(**batch, num_items_in_batch=items, **objective.options())["loss"]


TERMS = [
    [Loss(loss="cross_entropy", weight=0.3), Loss(loss="forward_kl", weight=0.7, temperature=2.0)],
    [Loss(loss="reverse_kl"), Loss(loss="jsd", beta=0.3), Loss(loss="logit_mse", weight=0.1)],
    [Loss(loss="cross_entropy"), Loss(loss="hidden_states"), Loss(loss="hidden_states", kind="cosine", weight=2.0)],
    [Loss(loss="forward_kl"), Loss(loss="attention", layers=[[0, 1], [1, 3]])],
]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(term.loss for term in terms))
def test_the_sum_does_not_depend_on_how_a_batch_is_split(terms: list[Loss]) -> None:
    """Rows at once, and row by row: the same loss and the same gradients."""
    student, asked, objective = objective_of(*terms)
    batch = batch_of()
    items = (batch["labels"][:, 1:] != IGNORED).sum()
    whole = loss_of(student, objective, asked, batch, items)
    whole.backward()
    at_once = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    total = 0.0
    for index in range(3):
        row = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        part = loss_of(student, objective, asked, row, items)
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, at_once[name], rtol=1e-4, atol=1e-6)


def test_it_is_the_dense_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    student, asked, objective = objective_of(*TERMS[0])
    monkeypatch.setattr("hfkit.distillation.objective.chunk_tokens", lambda *_: 4)
    batch = batch_of()
    found = loss_of(student, objective, asked, batch, None)
    found.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    keep = batch["labels"][:, 1:] != IGNORED
    logits = student(**inputs).logits[:, :-1][keep]
    with torch.no_grad():
        expected = asked.model(**inputs).logits[:, :-1][keep]
    kl = functional.kl_div(
        functional.log_softmax(logits / 2, -1), functional.log_softmax(expected / 2, -1), log_target=True,
        reduction="sum",
    )  # fmt: skip
    dense = 0.3 * functional.cross_entropy(logits, batch["labels"][:, 1:][keep], reduction="sum") + 0.7 * 4 * kl
    (dense / keep.sum()).backward()
    assert found.item() == pytest.approx((dense / keep.sum()).item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_attention_maps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    student, asked, objective = objective_of(Loss(loss="attention", kind="maps"), attn="eager")
    loss = loss_of(student, objective, asked, batch_of(), None)
    loss.backward()
    assert loss.item() > 0 and student.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    student, asked, objective = objective_of(*TERMS[0])
    monkeypatch.setattr("hfkit.distillation.objective.chunk_tokens", lambda *_: 4)
    batch = batch_of(rows=8)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            is_of_tokens = isinstance(output, torch.Tensor) and output.dim() > 1 and output.shape[-1] == 50
            if is_of_tokens and output.shape not in ((16, 50), (32, 50)):  # the heads themselves
                largest.append(output.numel())
            return output

    with Sizes():
        loss_of(student, objective, asked, batch, None).backward()
    assert largest and max(largest) <= 4 * 50


def test_layers_are_spread_evenly() -> None:
    assert spread(2, 4) == [[0, 1], [1, 3]] and spread(3, 12) == [[0, 3], [1, 7], [2, 11]] and spread(1, 1) == [[0, 0]]


# ---- where the signal comes from


def test_cached_targets_of_all_entries_teach_what_the_teacher_beside_it_does(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = run(KL, "output_dir=runs/online", "baseline=false")
    everything = ["targets={source: cached, method: top_k, k: 320}", "baseline=false"]
    cached = run(KL, *everything, "output_dir=runs/cached")
    assert losses("runs/cached") == pytest.approx(losses("runs/online"), rel=2e-3)  # probabilities in 16 bits
    assert cached["loss"] == pytest.approx(online["loss"], rel=1e-3) and cached["targets_bytes_per_token"] > 0

    def never(*args: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("hfkit.distillation.teacher.load_teacher", never)
    again = run(KL, *everything, "output_dir=runs/again", "train.seed=42", "train.learning_rate=2e-2")
    assert again["teacher_loss"] == cached["teacher_loss"]


def test_a_cache_is_not_used_for_another_teacher(recipe: Path) -> None:
    targets = ["targets={source: cached}", KL, "baseline=false"]
    run(*targets, "output_dir=runs/first")
    caches = set(Path("runs/.cache").glob("targets-*"))
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=6", "output_dir=runs/other"]) == 0
    run(*targets, "output_dir=runs/second", "teacher=runs/other")
    assert len(set(Path("runs/.cache").glob("targets-*")) - caches) == 1


def test_a_student_learns_what_its_teacher_wrote(recipe: Path) -> None:
    found = run(*TASK, "losses=[{loss: cross_entropy}]", "targets={source: generated}", "baseline=false")
    written = next(Path("runs/.cache").glob("generated-*"))
    made = manifest.read_json(written) or {}
    teacher_digest = (manifest.read_json(Path("runs/pretrain")) or {})["digest"]
    assert made["made_from"]["teacher"] == teacher_digest and made["metrics"]["rows"] > 0
    assert "rougeL" in found and "teacher_rougeL" in found


def test_a_student_learns_from_its_own_words(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    write = DistillationTrainer._written_by_student

    def written(self: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = write(self, batch)
        seen.append((batch, made))
        return made

    monkeypatch.setattr(DistillationTrainer, "_written_by_student", written)
    run(*TASK, KL, "targets={source: on_policy, share: 1.0}", "baseline=false", "generation={max_new_tokens: 5}")
    assert len(seen) == 4
    for before, after in seen:
        for row in range(4):
            prompt = before["input_ids"][row][: int((before["labels"][row] != IGNORED).nonzero()[0])]
            assert torch.equal(after["input_ids"][row][: len(prompt)], prompt)
            learned = after["labels"][row] != IGNORED
            assert 1 <= learned.sum() <= 5 and not learned[: len(prompt)].any()


CHATML = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def on_policy_trainer(generation: dict[str, Any], student: Any, folder: Path) -> DistillationTrainer:
    """A trainer whose student writes by itself, on a CPU."""
    args = training_arguments({"use_cpu": True, "report_to": "none", "max_steps": 1}, folder)
    objective = Objective([Loss(loss="forward_kl")], student, student.config, student.config.vocab_size, False)
    return DistillationTrainer(student, args, objective=objective, on_policy_share=1.0, generation=generation)


def writer(**own: Any) -> Any:
    """A student that writes all of 40 tokens alike, of whose configuration nothing says where it stops."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, eos_token_id=None, pad_token_id=None))
    student.lm_head.weight.data.zero_()
    student.generation_config.update(**own)
    return student


PROMPTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8] + [9] * 28, [5, 6, 9, 9] + [0] * 28] * 16),
    "attention_mask": torch.tensor([[1] * 32, [1, 1, 1, 1] + [0] * 28] * 16),
    "labels": torch.tensor([[IGNORED] * 4 + [9] * 28, [IGNORED] * 2 + [9, 9] + [IGNORED] * 28] * 16),
}


def written_after(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of each row that are learned."""
    return [row[labels != IGNORED].tolist() for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)]


def test_a_student_stops_at_the_ends_it_is_given_whatever_its_configuration_says(tmp_path: Path) -> None:
    """Ids are the tokenizer's: a configuration may have none, or others, as GPT-2's has no padding."""
    student = writer(eos_token_id=9, pad_token_id=9)
    ends = [1, 2, 3, 4, 20, 21, 22, 23]
    trainer = on_policy_trainer({"pad_token_id": 0, "eos_token_id": ends}, student, tmp_path)
    torch.manual_seed(0)
    rows = written_after(trainer._written_by_student(PROMPTS))
    assert all(not set(row[:-1]) & set(ends) for row in rows) and sum(row[-1] in ends for row in rows) > 24
    assert len({len(row) for row in rows}) > 4 and any(9 in row[:-1] for row in rows)
    assert student.generation_config.eos_token_id == 9  # as it was


@pytest.mark.parametrize("own", [{}, {"top_k": 1, "temperature": 0.01, "top_p": 0.1, "repetition_penalty": 5.0}])
def test_a_student_samples_from_its_whole_distribution(own: dict[str, Any], tmp_path: Path) -> None:
    """Neither the default top_k=50 of `generate` nor what the model's own configuration says changes a draw."""
    student = writer(**own)
    student.resize_token_embeddings(400)
    student.lm_head.weight.data.zero_()
    trainer = on_policy_trainer({"pad_token_id": 0, "eos_token_id": [1], "min_new_tokens": 20}, student, tmp_path)
    torch.manual_seed(0)
    drawn = [token for row in written_after(trainer._written_by_student(PROMPTS)) for token in row]
    assert len(drawn) > 600 and len(set(drawn)) > 250  # of 400 likely alike
    trainer.generation |= {"top_k": 3}
    few = [token for row in written_after(trainer._written_by_student(PROMPTS)) for token in row]
    assert len(set(few)) < len(set(drawn))


def test_a_student_writes_within_its_positions(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=34, bos_token_id=1, eos_token_id=1)
    trainer = on_policy_trainer({"pad_token_id": 0, "eos_token_id": [1]}, GPT2LMHeadModel(config), tmp_path)
    rows = written_after(trainer._written_by_student(PROMPTS))
    assert max(map(len, rows)) == 30


def test_a_chat_is_written_to_the_end_of_the_turn(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained("runs/pretrain")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    tokenizer.chat_template = CHATML
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, eos_token_id=None, pad_token_id=None))
    model.save_pretrained("runs/chat")
    tokenizer.save_pretrained("runs/chat")
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        DistillationTrainer, "_written_by_student", lambda self, batch: seen.append(self.generation) or batch
    )
    keys = ["teacher=runs/chat", "student=runs/chat", "task=chat", "data=recipes/chats.yaml", "train.max_steps=1"]
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"}]
    Path("chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{**turns[0], "content": f"the cat {number}"}, turns[1]]}) + "\n"
            for number in range(40)
        )
    )
    Path("recipes/chats.yaml").write_text(
        "stage: prepare\ncolumns: {messages: messages}\nsources: [{files: chats.jsonl}]\n"
        "split: {validation: 0.2, test: 0.2}\n"
    )
    run(*keys, KL, "targets={source: on_policy, share: 1.0}", "sequence_length=64", "evaluation_rows=1",
        "baseline=false", "generation={max_new_tokens: 5}")  # fmt: skip
    ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eot>")})
    assert seen == [{"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends, "max_new_tokens": 5}]


def test_what_the_student_writes_is_scored_with_one_tokenizer(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uld = ["cross_tokenizer=uld", "losses=[{loss: uld}]", "targets={source: on_policy}"]
    assert cli.main(["run", RECIPE, *TASK, *uld]) == 2
    assert (
        "targets.source=on_policy: on_policy: the teacher scores the student's own tokens" in capsys.readouterr().err
    )


def test_work_that_another_run_is_doing_is_not_done_twice(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock comes before the work, not after it."""
    from hfkit.distillation import generated

    monkeypatch.setattr(generated, "answers", lambda *_: pytest.fail("the teacher wrote"))

    @contextlib.contextmanager
    def held(folder: Path) -> Any:
        if folder.name.startswith("generated-"):
            raise HfkitError(f"{folder}: another run is writing this folder")
        with locked(folder):
            yield

    locked = manifest.locked
    monkeypatch.setattr(manifest, "locked", held)
    options = ["losses=[{loss: cross_entropy}]", "targets={source: generated}"]
    assert cli.main(["run", RECIPE, *TASK, *options]) == 2
    assert "another run is writing this folder" in capsys.readouterr().err


def test_another_tokenizer_is_compared_by_sorted_probabilities(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "recipes/tokenizer.yaml", "vocab_size=280", "output_dir=runs/other"]) == 0
    assert cli.main(["run", RECIPE, "tokenizer=runs/other"]) == 2
    told = capsys.readouterr().err
    assert "tokenizer" in told and "cross_tokenizer: uld" in told and "id " in told
    uld = ["cross_tokenizer=uld", "losses=[{loss: uld}, {loss: cross_entropy}]"]
    found = run("tokenizer=runs/other", *uld)
    assert 0 < found["aligned_share"] <= 1
    assert found["teacher_loss"] == pytest.approx(
        json.loads(Path("runs/pretrain/metrics.json").read_text())["loss"], rel=1e-5
    )


def test_a_student_cut_out_of_its_teacher_begins_with_its_weights(recipe: Path) -> None:
    run("student={from_teacher: {layers: [0, 1]}}", KL, "train.learning_rate=1e-9", "baseline=false")
    student, original = (load_file(f"runs/{name}/model.safetensors") for name in ("distill", "pretrain"))
    assert student.keys() == original.keys() and losses()[0] == pytest.approx(0.0, abs=1e-5)
    found = run("student={from_teacher: {layers: [1], hidden_size: 32}}", "output_dir=runs/narrow", "baseline=false")
    assert AutoModelForCausalLM.from_pretrained("runs/narrow").config.hidden_size == 32
    assert found["parameters"] < sum(tensor.numel() for tensor in original.values())


def test_a_stock_student_of_a_folder_takes_an_adapter(recipe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("runs/pretrain")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 8, **sizes))  # a padded vocabulary
    llama.save_pretrained("runs/llama")
    tokenizer.save_pretrained("runs/llama")
    found = run("student=runs/llama", "lora={r: 4}")
    assert (Path("runs/distill") / "adapter_model.safetensors").exists() and math.isfinite(found["gap_closed"])


def test_hidden_states_are_projected_and_the_map_is_not_kept(recipe: Path) -> None:
    run("losses=[{loss: forward_kl}, {loss: hidden_states, weight: 0.1}, {loss: attention}]", "baseline=false")
    log = [line for line in read_log(Path("runs/distill/metrics.jsonl")) if "loss" in line]
    assert all(line["loss_hidden_states"] > 0 and line["loss_attention"] > 0 for line in log)
    assert not [name for name in load_file("runs/distill/model.safetensors") if "distillation" in name]


def test_two_processes_learn_what_one_does(recipe: Path) -> None:
    """The same rows in each step: the same losses, up to the order of sums."""
    run("output_dir=runs/one", "train.per_device_train_batch_size=4", "baseline=false")
    options = ["output_dir=runs/two", "train.per_device_train_batch_size=2", "baseline=false", "train.use_cpu=true"]
    done = on_two("run", RECIPE, *options)
    assert done.returncode == 0, done.stderr
    assert losses("runs/two") == pytest.approx(losses("runs/one"), rel=1e-4)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["losses=[{loss: forward_lk}]"], ["losses.0.loss", 'did you mean "forward_kl"?']),
        (["losses=[{loss: forward_kl, temperature: 0}]"], ["losses.0.temperature", "must be above 0"]),
        (["losses=[{loss: forward_kl, beta: 0.5}]"], ["beta=0.5: forward_kl has no such argument"]),
        (["losses.0.weight=0", "losses.1.weight=0"], ["losses", "the weights sum to 0"]),
        (["losses=[{loss: cross_entropy}]"], ["losses", "no loss needs the teacher"]),
        (
            ["losses=[{loss: hidden_states, layers: [[0, 9]]}]"],
            ["losses.0.layers", "the layers 0 to 1"],
        ),
        (["losses=[{loss: hidden_states, projection: false}]"], ["losses.0.projection", "32 channels"]),
        (["losses=[{loss: attention, kind: maps}]"], ["losses.0.kind", "attn_implementation: eager"]),
        (["losses=[{loss: jsd}]", "targets={source: cached}"], ["losses.0", "cached targets are sparse"]),
        (["losses=[{loss: uld}]"], ["losses.0", "cross_tokenizer: uld"]),
        (["targets={source: generated}"], ["targets.source", "whole texts have no prompts"]),
        (["targets={source: online, draws: 9}"], ["draws=9: belongs to `source: cached`"]),
        (["student={from_teacher: {layers: [5]}}"], ["student.from_teacher.layers", "5 is not a layer"]),
        (["student={from_teacher: {layer: [0]}}"], ["student.from_teacher.layer", 'did you mean "layers"?']),
        (["student={from_teacher: {layers: [0]}, vocab_size: 16}"], ["student", "cannot stand beside vocab_size"]),
        (["student.hiden_size=3"], ["student.hiden_size", 'did you mean "hidden_size"?']),
        (["lora={r: 4}"], ["lora", "needs a base"]),
        (["sequence_length=64"], ["sequence_length", "the teacher's 32 positions"]),
        (["data=runs/tasks"], ["data", "has no column 'text'"]),
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
    assert "Traceback" not in told and not Path("runs/distill").exists()


def test_a_teacher_that_was_interrupted_is_made_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = Path("runs/pretrain")
    (teacher / "hfkit.json").rename(teacher / "hfkit.started.json")
    (teacher / "checkpoint-4").mkdir()
    for path in (teacher / "config.json", teacher / "tokenizer.json"):
        path.unlink()
    assert cli.main(["plan", RECIPE, "teacher=pretrain.yaml"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  pretrain "))
    assert "runs/pretrain " in line and "unfinished: will resume" in line


def test_an_encoder_decoder_is_no_teacher(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, num_heads=2).save_pretrained("runs/t5")
    assert cli.main(["run", RECIPE, "teacher=runs/t5"]) == 2
    assert "is an encoder-decoder, and only decoders are distilled" in capsys.readouterr().err


def test_a_small_teacher_is_warned_of(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("student.hidden_size=96", "student.num_hidden_layers=4", "baseline=false")
    assert "WARNING: the teacher has fewer parameters than the student" in capsys.readouterr().out


def test_a_teacher_whose_logits_are_not_its_heads_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained("runs/pretrain")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma2Config(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=2, **sizes)
    model = Gemma2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=30.0)  # so that the cap of its logits shows
    model.save_pretrained("runs/gemma")
    tokenizer.save_pretrained("runs/gemma")
    assert cli.main(["run", RECIPE, "teacher=runs/gemma"]) == 2
    assert "runs/gemma are not a linear map of its hidden states" in capsys.readouterr().err


def test_teacher_and_student_in_bfloat16(recipe: Path) -> None:
    found = run("train.bf16=true", "train.use_cpu=true", "baseline=false")
    assert found["precision"] == "bf16" and math.isfinite(found["loss"])
