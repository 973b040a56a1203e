"""What every training promises: exact sums, resumption, both optimizers, honest speed."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import TrainerControl, TrainerState, TrainingArguments, default_data_collator

from hfkit import cli
from hfkit.data.rows.packing import IGNORED, PackedRows
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.model.flops import training_flops_per_token
from hfkit.runtime import devices
from hfkit.training import decisions
from hfkit.training.callbacks import MetricsFile, Speed, draw_loss, read_log
from hfkit.training.compilation import compiled_layers, uncompiled
from hfkit.training.optimizers import MuonWithAdamW, kinds_of, orthogonalize
from hfkit.training.trainer import HfkitTrainer, loading, training_arguments

PRETRAIN = "recipes/pretrain.yaml"


def metrics(folder: str = "runs/pretrain") -> dict[str, Any]:
    return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))


def weights(folder: str) -> dict[str, torch.Tensor]:
    return HfkitForCausalLM.from_pretrained(folder).state_dict()


def test_a_pretraining_leaves_what_it_promises(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", PRETRAIN, "train.eval_strategy=steps", "train.eval_steps=2"]) == 0
    folder = Path("runs/pretrain")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "modeling_hfkit.py", "metrics.json"}
    assert names >= {"metrics.jsonl", "loss.png", "README.md", "hfkit.json", "generation_config.json"}
    assert not any(name.startswith(("checkpoint", ".result", "training_args")) for name in names)

    found = metrics()
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (
        found["parameters"] == sum(tensor.numel() for tensor in weights("runs/pretrain").values()) - 320 * 32
    )  # tied
    assert found["size_bytes"] > (folder / "model.safetensors").stat().st_size
    assert found["tokens_per_second"] > 0 and 0 < found["mfu"] < 1 and found["train_seconds"] > 0
    assert {"validation_loss", "validation_perplexity", "validation_bits_per_byte", "bits_per_byte"} <= set(found)

    log = read_log(folder / "metrics.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in log if "eval_loss" in line] == [2, 4]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "xz -9e" in shown and "of the measured matmul peak" in shown and "are in runs/pretrain/" in shown
    assert shown.count("    | ") >= 3


def test_the_loss_is_a_sum_over_the_tokens_of_text_never_trained_on(ready: Path) -> None:
    """Loss and bits per byte of the test split, computed again document by document without packing."""
    from transformers import AutoTokenizer

    from hfkit.data import corpus

    assert cli.main(["run", PRETRAIN, "sequence_length=128", "model.max_position_embeddings=256"]) == 0
    model = HfkitForCausalLM.from_pretrained("runs/pretrain").eval()
    tokenizer = AutoTokenizer.from_pretrained("runs/pretrain")
    nats = tokens = size = 0.0
    for text in corpus.texts("runs/data", "test"):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        # In one window where it fits a row; a longer one is cut as the rows are, so these are short.
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nats += functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        size += len(text.encode())
    # Documents that were cut at the end of a row lose the context before it, hence the tolerance.
    assert metrics()["loss"] == pytest.approx(nats / tokens, rel=2e-2)
    assert metrics()["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=2e-2)
    rows = PackedRows(next(Path("runs/.cache").iterdir()), "test")
    assert rows.predicted_tokens == tokens and rows.bytes == size


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    ready: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    common = ["run", PRETRAIN, f"optimizer={optimizer}", "model.attention_dropout=0.1"]
    assert cli.main([*common, "output_dir=runs/whole"]) == 0

    class Killed(Exception):
        pass

    def kill(self: Speed, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsFile, "on_step_end", kill)
        cli.main([*common, "output_dir=runs/parts"])
    assert not Path("runs/parts/hfkit.json").exists() and Path("runs/parts/checkpoint-2").is_dir()
    assert not list(Path("runs/parts").rglob("training_args.bin"))

    assert cli.main([*common, "output_dir=runs/parts"]) == 0
    whole, parts = weights("runs/whole"), weights("runs/parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [
        [(line["step"], line["loss"]) for line in read_log(Path(f"runs/{name}/metrics.jsonl"))]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_an_unfinished_run_of_another_recipe_is_not_resumed(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HfkitTrainer, "evaluate", stop)
        assert cli.main(["run", PRETRAIN]) == 75
    assert "rerun the same command to resume" in capsys.readouterr().err
    assert cli.main(["run", PRETRAIN, "train.learning_rate=5e-3"]) == 2
    assert "train.learning_rate: 0.01 -> 0.005" in capsys.readouterr().err
    assert cli.main(["run", PRETRAIN]) == 0
    assert "resuming from runs/pretrain/checkpoint-4" in capsys.readouterr().out


def test_a_corpus_smaller_than_a_row_is_told_and_leaves_nothing(
    ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", PRETRAIN, "sequence_length=100000"]) == 2
    message = capsys.readouterr().err
    assert "sequence_length=100000: the train split of runs/data has only" in message and "shorten" in message
    assert not Path("runs/pretrain").exists()
    assert cli.main(["run", PRETRAIN, "train.max_steps=1"]) == 0


def test_training_learns(ready: Path) -> None:
    assert cli.main(["run", PRETRAIN, "optimizer=muon", "train.max_steps=60", "train.save_strategy=no"]) == 0
    log = [line["loss"] for line in read_log(Path("runs/pretrain/metrics.jsonl")) if "loss" in line]
    assert log[-1] < 0.7 * log[0]
    assert metrics()["loss"] < 0.7 * log[0]


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_every_kind_of_positions_and_packing_trains(ready: Path, packing: str, positions: str) -> None:
    options = [f"packing={packing}", f"model.position_embedding_type={positions}", "train.max_steps=1"]
    assert cli.main(["run", PRETRAIN, *options, "train.save_strategy=no"]) == 0
    assert math.isfinite(metrics()["loss"])


def test_accumulation_does_not_change_the_result(ready: Path) -> None:
    """Eight rows at once, and eight times one row: the same weights."""
    common = ["run", PRETRAIN, "train.max_steps=2", "train.save_strategy=no"]
    once = ["train.per_device_train_batch_size=8", "output_dir=runs/once"]
    parts = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=8", "output_dir=runs/parts"]
    assert cli.main([*common, *once]) == cli.main([*common, *parts]) == 0
    for name, tensor in weights("runs/once").items():
        torch.testing.assert_close(tensor, weights("runs/parts")[name], rtol=1e-3, atol=1e-5)


def test_a_tokenizer_from_elsewhere_and_a_data_folder_are_inputs_too(ready: Path) -> None:
    shutil.copytree("runs/tokenizer", "mine")
    Path("mine/hfkit.json").unlink()
    assert cli.main(["run", PRETRAIN, "tokenizer=mine", "data=runs/data", "train.max_steps=1"]) == 0


# ---- optimizers


def small_model() -> HfkitForCausalLM:
    torch.manual_seed(0)
    return HfkitForCausalLM(HfkitConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))


def parameters_of(model: HfkitForCausalLM) -> tuple[list[Any], list[Any]]:
    """Those that Muon takes, and the rest."""
    kinds = kinds_of(model)
    hidden = [parameter for name, parameter in model.named_parameters() if kinds[name] == "matrix"]
    return hidden, [parameter for name, parameter in model.named_parameters() if kinds[name] != "matrix"]


def muon_for(model: HfkitForCausalLM, dtype: torch.dtype = torch.bfloat16) -> MuonWithAdamW:
    hidden, rest = parameters_of(model)
    muon, adamw = {"lr": 0.01, "weight_decay": 0.1, "dtype": dtype}, {"lr": 0.01}
    return MuonWithAdamW({"params": hidden}, [{"params": rest}], muon, adamw)


def step(model: HfkitForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = small_model()
    hidden = {name for name, kind in kinds_of(model).items() if kind == "matrix"}
    assert len(hidden) == 2 * 7 and not any("embed" in name or "norm" in name for name in hidden)
    optimizer = muon_for(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, optimizer)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
        assert ("momentum_buffer" in optimizer.state[parameter]) == (name in hidden)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 1e-6), (torch.float32, 0.02)], ids=["bfloat16", "float32"]
)
def test_muon_in_batches_makes_the_updates_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 those of `torch.optim.Muon`, which computes in it; in float32 those but for its rounding."""
    one, two = small_model(), small_model()
    together = muon_for(one, dtype)
    hidden, rest = parameters_of(two)
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01)
    begin = [parameter.detach().clone() for parameter in two.parameters()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        together.step()
        muon.step()
        adamw.step()
    for a, b, before in zip(one.parameters(), two.parameters(), begin, strict=True):
        assert (a - b).norm() <= tolerance * (b - before).norm()


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrices = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.3


def test_embeddings_and_head_may_have_rates_of_their_own(ready: Path) -> None:
    """Each follows the schedule of the rest, from its own height; a resumed run has them too."""
    recipe = ["run", PRETRAIN, "model.tie_word_embeddings=false", "train.lr_scheduler_type=linear"]
    rates = "{name: NAME, embedding_learning_rate: 0.3, head_learning_rate: 0.02}"
    for name in ("adamw", "muon"):
        seen: list[dict[str, float]] = []

        def note(self: Any, args: Any, state: Any, control: Any, optimizer: Any, model: Any, **_: Any) -> None:
            names = {parameter: name for name, parameter in model.named_parameters()}
            seen.append({names[each]: group["lr"] for group in optimizer.param_groups for each in group["params"]})  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MetricsFile, "on_pre_optimizer_step", note)
            assert cli.main([*recipe, f"optimizer={rates.replace('NAME', name)}", f"output_dir=runs/{name}"]) == 0
        assert len(seen) == 4
        for step, rate_of in enumerate(seen):
            share = 1 - step / 4
            for part, rate in (("model.embed_tokens", 0.3), ("lm_head", 0.02), ("model.norm", 0.01)):
                assert rate_of[f"{part}.weight"] == pytest.approx(rate * share)


def test_muon_is_saved_and_scheduled_as_one_optimizer() -> None:
    model = small_model()
    optimizer = muon_for(model)
    step(model, optimizer)
    other = small_model()
    other.load_state_dict(model.state_dict())
    again = muon_for(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, again):
        torch.optim.lr_scheduler.LambdaLR(each, lambda _: 0.5)
        assert {group["lr"] for group in each.param_groups} == {0.005}
    step(model, optimizer)
    step(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# ---- measuring


def test_the_flops_are_those_of_the_formula() -> None:
    tied = HfkitConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    free = HfkitConfig(**{**tied.to_diff_dict(), "tie_word_embeddings": False})
    counts = [training_flops_per_token(HfkitForCausalLM(config), 10) for config in (tied, free)]
    parameters = HfkitForCausalLM(tied).num_parameters()
    assert counts == [6 * parameters + 12 * 2 * 16 * 10] * 2


def test_precision_is_the_one_that_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(devices, "matmul_flops", lambda device, dtype: speeds[dtype])
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert devices.fastest_precision(torch.device("cpu")) == ("fp32", 2.0)
    speeds[torch.bfloat16] = 3.0
    assert devices.fastest_precision(torch.device("cpu")) == ("bf16", 3.0)


def test_without_a_compiler_training_goes_on(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decisions.shutil, "which", lambda name: None)
    recipe = Path(PRETRAIN)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("  torch_compile: false\n", ""), encoding="utf-8")
    assert cli.main(["run", PRETRAIN, "train.max_steps=1"]) == 0
    assert capsys.readouterr().out.count("no C++ compiler found") == 1


def test_a_pass_whose_logits_do_not_fit_decides_for_compilation(tmp_path: Path) -> None:
    """A training takes them in chunks: it fits."""
    model, args = small_model(), training_arguments({}, tmp_path)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions.shutil, "which", lambda name: name)
        pays = [decisions._compilation_pays(args, model, rows, default_data_collator, 1, "bf16")]
        patch.setattr(model, "loss_function", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError))
        pays += [decisions._compilation_pays(args, model, rows, default_data_collator, 1, "bf16")]
    assert pays == [False, True]


def test_batches_for_a_gpu_are_pinned_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("cuda", "cpu"):
        args = training_arguments({}, tmp_path, **loading(torch.device(name)))
        trainer = HfkitTrainer(small_model(), args, train_dataset=[{"input_ids": torch.arange(8)}] * 8)
        assert trainer.accelerator.non_blocking == (name == "cuda")
        assert loading(torch.device(name))["dataloader_pin_memory"] == (name == "cuda")


def test_layers_are_compiled_for_the_training_and_give_the_same_losses() -> None:
    """One code for all layers; none of it is left afterwards, and an evaluation between does not use it."""
    ids, losses = torch.arange(24)[None].repeat(2, 1), []
    for is_wanted in (False, True):
        model = small_model()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with compiled_layers(model, is_wanted):
            for _ in range(3):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                with uncompiled(), torch.no_grad():
                    evaluated = model(input_ids=ids[:, :9], labels=ids[:, :9], use_cache=False).loss
                losses.append((loss.item(), evaluated.item()))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == is_wanted
    assert np.allclose(losses[:3], losses[3:], rtol=1e-5)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_what_was_decided_stands_when_a_run_is_resumed(tmp_path: Path) -> None:
    decided = {"precision": "bf16", "torch_compile": True, "roof_flops": 1.0}
    (tmp_path / "hfkit.started.json").write_text(json.dumps({"decisions": decided}), encoding="utf-8")
    args = training_arguments({}, tmp_path)
    assert decisions.decide({}, args, None, None) == decided  # type: ignore[arg-type]


def test_the_library_refuses_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(HfkitError, match="train: .*strategy"):
        training_arguments({"load_best_model_at_end": True, "save_strategy": "steps"}, tmp_path)


def test_speed_leaves_out_pauses_and_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 50.0, 62.0, 62.0])
    monkeypatch.setattr("hfkit.training.callbacks.time.perf_counter", lambda: next(clock))
    trainer = type("Stub", (), {"pauses": 0.0})()
    speed = Speed(trainer, tokens_per_step=100, flops_per_token=2.0, roof_flops=1000.0)
    state, control, args = TrainerState(), TrainerControl(), TrainingArguments("unused", use_cpu=True)
    speed.on_train_begin(args, state, control)
    state.global_step = 1
    speed.on_step_end(args, state, control)
    trainer.pauses, state.global_step = 2.0, 5
    logs = {"loss": 1.0}
    speed.on_log(args, state, control, logs=logs)
    assert speed.first_step_seconds == 50.0
    assert logs == {"loss": 1.0, "tokens_per_second": 40.0, "mfu": 0.08}  # 4 * 100 tokens in 12 - 2 seconds
    assert speed.summary() == {"tokens_per_second": 40.0, "mfu": 0.08}


def test_a_log_that_a_kill_cut_short_is_read_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    draw_loss(read_log(tmp_path / "metrics.jsonl"), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_labels_of_a_row_are_never_context(ready: Path) -> None:
    assert cli.main(["run", PRETRAIN, "train.max_steps=1"]) == 0
    rows = PackedRows(next(Path("runs/.cache").iterdir()), "train")
    row = rows[0]
    assert set(row) == {"input_ids", "labels", "position_ids"}
    assert torch.equal(row["labels"] == IGNORED, row["position_ids"] == 0)
