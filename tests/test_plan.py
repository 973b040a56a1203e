"""What a recipe will take: counted, measured on this machine, foreseen on another."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from hfkit import cli
from hfkit.engine import graph, plans
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.planning import facts, machines, memory, rows, shapes
from hfkit.planning.estimate import Costs, Speeds
from hfkit.planning.schedule import schedule_of
from hfkit.planning.stages.prepare import work
from hfkit.planning.work import Lengths, Model, Reading, Texts, Tokens, Training
from hfkit.runtime import resources

PRETRAIN, DATA = "recipes/pretrain.yaml", "recipes/data.yaml"
SPEEDS = Speeds("bf16", 1e12, 0.0, 0.7e9)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def small(**fields: Any) -> Model:
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Model(HfkitConfig(**{**sizes, "max_position_embeddings": 64, **fields}), None)


def training(model: Model, length: int = 64, optimizer: str = "adamw", **train: Any) -> Training:
    lengths = Lengths((length,), length - 1, length)
    reads = (Reading("evaluating", model, 10, lengths, train.get("per_device_train_batch_size", 8)),)
    return Training(
        "training", model, train, 1000, lengths, optimizer, at_evaluations=reads, may=("lora", "quantization")
    )


# ---- the command


def test_a_plan_says_what_a_run_will_be(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned on a fresh clone, where nothing is prepared: the counts are those of the run."""
    shown = plan(capsys, PRETRAIN)
    assert shown.count("will run") == 3 and "total" in shown
    planned = {name: plans.kept(graph.resolve(Path(f"recipes/{name}.yaml"))) for name in ("data", "pretrain")}
    assert cli.main(["run", PRETRAIN]) == 0
    made = json.loads(Path("runs/pretrain/hfkit.json").read_text(encoding="utf-8"))
    steps, tokens = planned["pretrain"]["steps"], planned["pretrain"]["tokens"]  # type: ignore[index]
    assert steps == made["metrics"]["steps"] and tokens == steps * 4 * 32
    assert f"{made['metrics']['parameters']:,}, all trained" in shown
    assert planned["data"]["seconds"] > 0 and planned["pretrain"]["peak_memory_bytes"] > 1e8  # type: ignore[index]


def test_a_data_set_is_counted_before_it_is_there(world: Path) -> None:
    node = graph.resolve(Path(DATA))
    texts = work(node.recipe, {}).makes
    assert cli.main(["run", DATA]) == 0
    made = json.loads(Path("runs/data/metrics.json").read_text(encoding="utf-8"))
    assert texts.is_exact
    assert texts.rows == {split: entry["rows"] for split, entry in made["splits"].items()}
    assert texts.bytes == {split: entry["bytes"] for split, entry in made["splits"].items()}


def test_what_is_up_to_date_costs_nothing(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "recipes/tokenizer.yaml")
    assert shown.count("up to date") == 2 and "total" not in shown and "kWh" not in shown
    shown = plan(capsys, PRETRAIN, "--on", "h100")
    assert re.search(r"data.yaml +runs/data +up to date\n", shown) and "total" in shown


def test_a_named_machine_is_priced(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, PRETRAIN, "--on", "h100x8")
    assert (
        "8 x h100, 8 processes" in shown and "35% of the published 989 TFLOP/s" in shown and "$3.00 an hour" in shown
    )
    assert "in 4 steps of 1,024" in shown, "each of the eight takes its rows"
    assert plans.kept(graph.resolve(Path(PRETRAIN))) is None, "only what this machine will do goes to the card"
    Path("prices.yaml").write_text("dollars_per_hour: {h100: 7}\nutilisation: 0.5\n", encoding="utf-8")
    shown = plan(capsys, PRETRAIN, "--on", "h100")
    assert "50% of the published" in shown and "$7.00 an hour" in shown and "prices.yaml prices" in shown


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("h10", 'did you mean "h100"'),
        ("toaster", "known: a100"),
        ("h100x0", "write h100 for one"),
        ("h100x", "write h100 for one"),
        ("x8", "no such machine"),
    ],
)
def test_a_machine_that_is_none_is_told(name: str, told: str, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", PRETRAIN, "--on", name]) == 2
    error = capsys.readouterr().err
    assert f"--on {name}: " in error and told in error


def test_an_x_in_a_name_is_no_number() -> None:
    assert machines.named("rtx4090", machines.Prices()).count == 1
    assert machines.named("RTX4090x2", machines.Prices()).count == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dollars_per_hour: 3", "must be by machine"),
        ("utilization: 0.5", 'did you mean "utilisation"'),
        ("watts: {h10: 3}", 'did you mean "h100"'),
        ("grams_per_kwh: -1", "not negative"),
        ("[1", "is not YAML"),
    ],
)
def test_prices_that_are_none_are_told(text: str, told: str, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prices.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["plan", PRETRAIN, "--on", "h100"]) == 2
    assert told in capsys.readouterr().err


def test_what_is_on_the_hub_is_said_to_be_unknown(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing asks the network, and nothing fails."""
    recipe = "stage: evaluate\nmodel: someone/a-model\ndata: runs/data\ntask: text\n"
    Path("recipes/evaluate.yaml").write_text(recipe, encoding="utf-8")
    shown = plan(capsys, "recipes/evaluate.yaml")
    assert "someone/a-model is on the Hub and not in the cache" in shown


# ---- configurations of Accelerate


ROOT = Path(__file__).parent.parent


def test_a_configuration_shares_the_memory(ready: Path) -> None:
    big = training(small(hidden_size=512, num_hidden_layers=8, num_attention_heads=8), bf16=True)
    of = {
        name: memory.of_training(big, spread, is_half=True, is_cpu=False)
        for name in ("multi_gpu", "fsdp2", "deepspeed_zero3")
        if (spread := machines.spread_of(ROOT / "accelerate_configs" / f"{name}.yaml"))
    }
    for part in ("gradients", "optimizer"):
        assert of["fsdp2"][part] == of["deepspeed_zero3"][part] == of["multi_gpu"][part] / 8
    assert of["fsdp2"]["weights"] < of["multi_gpu"]["weights"] / 2
    assert of["fsdp2"]["activations"] == of["multi_gpu"]["activations"], "each has rows of its own"


def test_a_configuration_and_a_machine_must_agree(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
    assert cli.main(["plan", PRETRAIN, "--on", "h100x4", "--config", config]) == 2
    assert "name h100x8" in capsys.readouterr().err
    assert "8 processes, FSDP2" in plan(capsys, PRETRAIN, "--on", "h100", "--config", config)
    Path("none.yaml").write_text("a: 1\n", encoding="utf-8")
    assert cli.main(["plan", PRETRAIN, "--config", "none.yaml"]) == 2
    assert "has no distributed_type" in capsys.readouterr().err


# ---- counting


def test_a_schedule_is_that_of_the_trainer() -> None:
    told = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    epochs = schedule_of(training(small(), num_train_epochs=3, eval_strategy="epoch", **told), 1)
    assert (epochs.steps, epochs.evaluations, epochs.rows_a_step) == (3 * 63, 3, 16)
    steps = schedule_of(
        training(small(), max_steps=100, eval_strategy="steps", eval_steps=30, save_steps=40, **told), 4
    )
    assert (steps.steps, steps.evaluations, steps.saves, steps.rows_a_step) == (100, 3, 3, 64)


def test_the_parts_of_the_memory() -> None:
    model = small(tie_word_embeddings=True)
    parameters = HfkitForCausalLM(model.config).num_parameters()
    adamw = memory.of_training(training(model), machines.Spread(), is_half=False, is_cpu=True)
    assert adamw["weights"] == adamw["gradients"] == 4 * parameters and adamw["optimizer"] == 8 * parameters
    muon = memory.of_training(training(model, optimizer="muon"), machines.Spread(), is_half=False, is_cpu=True)
    assert 4 * parameters < muon["optimizer"] < adamw["optimizer"], "one moment of each hidden matrix, else two"
    adapted = Model(model.config, None, lora={"r": 4})
    lora = memory.of_training(training(adapted), machines.Spread(), is_half=False, is_cpu=True)
    assert lora["gradients"] < adamw["gradients"] / 5 and lora["weights"] > adamw["weights"]
    quantized = Model(model.config, None, {"r": 4}, "bitsandbytes", {"load_in_4bit": True})  # type: ignore[arg-type]
    assert shapes.shape_of(model, 8).weight_bytes == 4 * parameters and quantized is not None


def test_activations_are_those_that_autograd_keeps() -> None:
    """Against what a real forward pass saves."""
    import torch

    model, kept = small(), dict[int, int]()
    real = HfkitForCausalLM(model.config).train()
    weights = {each.untyped_storage().data_ptr() for each in real.parameters()}
    tensors = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)  # or else another may get its place
        return tensor

    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = real.model(input_ids=ids, position_ids=torch.arange(64)[None].expand(4, 64), use_cache=False)
    found = shapes.kept_for_backward(model, 4, 64, is_half=False, is_masked=True, checkpointing=False)
    assert found == pytest.approx(sum(kept.values()), rel=0.05) and outputs is not None
    assert shapes.kept_for_backward(model, 4, 64, False, True, checkpointing=True) < found


def test_rows_are_counted_as_packing_makes_them(ready: Path) -> None:
    texts, tokens = facts.known_of("runs/data", "data set"), facts.known_of("runs/tokenizer", "tokenizer")
    assert isinstance(texts, Texts) and isinstance(tokens, Tokens)
    found = rows.packed(texts, tokens, 32, "documents")
    assert cli.main(["run", PRETRAIN, "train.max_steps=1"]) == 0
    told = json.loads(next(Path("runs/.cache").glob("tokens-*/tokens.json")).read_text(encoding="utf-8"))
    for split, entry in told["splits"].items():
        assert found[split][0] == pytest.approx(entry["rows"], rel=0.1, abs=2)


def test_a_quantized_model_on_disk_is_known_by_the_sizes_of_the_whole_one(tmp_path: Path) -> None:
    """It is made of random weights and quantized again to be timed: its configuration must not say that it is."""
    config = small().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    config.save_pretrained(tmp_path)
    found = facts.known_of(str(tmp_path), "model")
    assert isinstance(found, Model) and found.method == "bitsandbytes" and found.quantization["load_in_8bit"]  # type: ignore[index]
    assert not hasattr(found.config, "quantization_config")
    assert shapes.shape_of(found, 8).weight_bytes < shapes.shape_of(small(), 8).weight_bytes / 2


# ---- what does not fit


def costs(gigabytes: float, count: int = 1) -> Costs:
    machine = machines.Machine("small", count, 1e14, gigabytes * 1e9, 1e12, 100, 1.0)
    return Costs(machine, machines.Spread(count, "data parallel"), machines.Prices(), SPEEDS, 0, 0.35)


@pytest.mark.parametrize(
    ("gigabytes", "sizes", "train", "change"),
    [
        (80, {}, {}, ""),
        (3, {"num_hidden_layers": 8}, {"per_device_train_batch_size": 256}, "train.per_device_train_batch_size"),
        (6, {"hidden_size": 1024, "num_hidden_layers": 24}, {"per_device_train_batch_size": 1}, "lora="),
        (1.0, {"hidden_size": 4096, "num_hidden_layers": 40}, {"per_device_train_batch_size": 1}, None),
    ],
)
def test_one_change_makes_it_fit(
    gigabytes: float, sizes: dict[str, int], train: dict[str, int], change: str | None
) -> None:
    from hfkit.planning.costs import of_models
    from hfkit.planning.work import Work

    asked = training(small(vocab_size=1000, max_position_embeddings=512, **sizes), 512, **train)
    found = of_models(costs(gigabytes), Work([asked])).change
    assert found == change if not change else found is not None and found.startswith(change)


def test_a_change_that_is_named_does_make_it_fit() -> None:
    """The words are a recipe's: with them, nothing is left to be changed."""
    from hfkit.planning.costs import of_models
    from hfkit.planning.work import Work

    model = small(vocab_size=1000, num_hidden_layers=8, max_position_embeddings=512)
    asked = training(model, 512, per_device_train_batch_size=256)
    change = of_models(costs(3), Work([asked])).change
    assert change is not None
    told = {name: int(value) for name, value in re.findall(r"train\.(\w+)=(\d+)", change)}
    assert told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] == 256
    again = of_models(costs(3), Work([training(model, 512, **told)]))
    assert again.change == "" and again.peak < 3e9


def test_a_plan_warns_of_what_does_not_fit(
    ready: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(machines.TABLE, "t4", (65, 1.0, 320, 70, 0.35))
    shown = plan(capsys, PRETRAIN, "--on", "t4", "train.per_device_train_batch_size=4096")
    assert re.search(r"WARNING: recipes/pretrain.yaml: needs .* and t4 has 1.0 GB. It fits with: train.per_dev", shown)


# ---- what was used


def test_memory_is_that_of_the_time_inside() -> None:
    with resources.metered() as used:
        block = bytearray(300_000_000)
        block[::4096] = b"x" * len(block[::4096])
    del block
    with resources.metered() as after:
        pass
    assert used["hardware"]["cores"] and used["hardware"]["memory_bytes"] > 1e8
    if sys.platform == "linux" and "gpus" not in used["hardware"]:
        assert after["peak_memory_bytes"] < used["peak_memory_bytes"] - 200_000_000


def test_a_meter_never_fails_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setattr(resources, "peak_memory", lambda: 1 / 0)
    with resources.metered() as used:
        pass
    assert "peak_memory_bytes" not in used
    with pytest.raises(HfkitError, match="mine"), resources.metered():
        raise HfkitError("mine")


def test_the_counter_of_the_processor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("10000000")
    (package / "energy_uj").write_text("9000000")
    monkeypatch.setattr(resources, "POWERCAP", tmp_path)
    with resources.metered() as used:
        (package / "energy_uj").write_text("2600000")  # it began again at 0
    assert used["energy_source"] == "RAPL" and used["energy_kwh"] == pytest.approx(3.6 / 3.6e6)
