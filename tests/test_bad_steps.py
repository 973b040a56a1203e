"""A step with bad numbers never reaches the weights, is counted and told, and too many of them end the run."""

import copy
import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.data.rows.packing import PackedRows, token_rows
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.runtime import signals
from hfkit.training import checkpoints
from hfkit.training.bad_steps import FEWEST_STEPS, RECENT_STEPS, StepGuard
from hfkit.training.callbacks import MetricsFile, read_log
from hfkit.training.settings import BadSteps
from hfkit.training.trainer import CrossEntropy, HfkitTrainer, training_arguments
from tests.interrupting import PRETRAIN, terminate

NAN, INF = math.nan, math.inf
ROWS = Path()  # of the toy data, see below

# ---- judging


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (0.0, 1.0, None),
        (NAN, 1.0, "loss is nan"),
        (INF, 1.0, "loss is inf"),
        (-INF, 1.0, "loss is -inf"),
        (0.0, NAN, "gradient norm is nan"),
        (0.0, INF, "gradient norm is inf"),
        (NAN, NAN, "loss is nan and gradient norm is nan"),
        (0.0, 1e30, None),  # a spike is no matter unless one asks
    ],
)
def test_what_is_not_finite_is_bad(loss: float, norm: float, reason: str | None) -> None:
    guard = StepGuard(BadSteps(), norms=[1.0] * 50)
    assert guard.judge(loss, norm) == reason
    assert guard.skipped == guard.in_a_row == (reason is not None)


def test_bad_steps_are_counted_and_a_good_one_ends_the_row() -> None:
    guard = StepGuard(BadSteps(stop_after=3))
    counts = []
    for loss in (NAN, NAN, 0.0, INF, NAN, NAN):
        guard.judge(loss, 1.0)
        counts.append((guard.skipped, guard.in_a_row, guard.is_exhausted))
    assert [skipped for skipped, _, _ in counts] == [1, 2, 2, 3, 4, 5]
    assert [row for _, row, _ in counts] == [1, 2, 0, 1, 2, 3]
    assert [done for _, _, done in counts] == [False] * 5 + [True]


def test_a_spike_is_told_from_the_recent_good_steps() -> None:
    norms = [float(norm) for norm in np.random.default_rng(0).normal(2.0, 0.1, FEWEST_STEPS)]
    guard = StepGuard(BadSteps(spike_sigma=4))
    for norm in norms[:-1]:
        assert guard.judge(0.0, norm) is None
    assert copy.deepcopy(guard).judge(0.0, 1e6) is None, "there are too few steps to speak of a mean"
    assert guard.judge(0.0, norms[-1]) is None
    mean, deviation = np.mean(norms), np.std(norms)
    assert guard.judge(0.0, mean + 3.9 * deviation) is None
    guard.norms.pop()
    assert guard.judge(0.0, mean + 5 * deviation) == (
        f"gradient norm is {mean + 5 * deviation:.3g}, 5.0 sigma above its recent mean of {mean:.3g}"
    )
    assert guard.norms == norms, "a spike must not count for the mean"
    assert guard.judge(0.0, 0.0) is None, "a small gradient is no spike"


def test_only_the_recent_norms_are_kept() -> None:
    guard = StepGuard(BadSteps(spike_sigma=3))
    for norm in range(RECENT_STEPS + 50):
        guard.judge(0.0, norm / 1000)
    assert guard.norms == [norm / 1000 for norm in range(50, RECENT_STEPS + 50)]


# ---- training


class Steps(TrainerCallback):
    """Keeps weights and optimizer as they are before and after each step; may do something in one."""

    def __init__(self, act: Callable[..., None] | None = None):
        self.act = act
        self.before: dict[int, Any] = {}
        self.after: dict[int, Any] = {}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **k: Any) -> None:
        self.before[state.global_step + 1] = copy.deepcopy((k["model"].state_dict(), k["optimizer"].state_dict()))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **k: Any
    ) -> None:
        if self.act is not None:
            self.act(state.global_step + 1, k["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **k: Any) -> None:
        self.after[state.global_step] = copy.deepcopy((k["model"].state_dict(), k["optimizer"].state_dict()))


def equal(one: Any, other: Any) -> bool:
    """The same values bit by bit, but for the learning rate, which the schedule moves."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one if key != "lr")
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def trainer_of(
    folder: Path,
    bad: Collection[int] = (),
    kind: str = "loss",
    steps: Steps | None = None,
    optimizer: str = "adamw",
    bad_steps: dict[str, Any] | None = None,
    **train: Any,
) -> HfkitTrainer:
    """Train a small model in which the micro-batches `bad`, counted from 1, have a NaN loss or an Inf gradient."""
    rows = PackedRows(ROWS, "train")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    model = HfkitForCausalLM(HfkitConfig(vocab_size=320, **shape))
    accumulation = train.get("gradient_accumulation_steps", 1)
    found = checkpoints.newest(folder) if folder.exists() else None
    passes = int(found.name.split("-")[1]) * accumulation if found else 0

    def spoil(module: Any, arguments: Any, output: Any) -> None:
        nonlocal passes
        if not module.training:
            return
        passes += 1
        if passes in bad and kind == "loss":
            output.loss = output.loss * NAN

    model.register_forward_hook(spoil)
    head = model.get_input_embeddings().weight
    head.register_hook(lambda grad: grad * (INF if passes in bad and kind == "gradient" else 1.0))
    values = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    values |= {"weight_decay": 0.1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 3}
    folder.mkdir(exist_ok=True)
    args = training_arguments({**values, "logging_nan_inf_filter": False, **train}, folder)
    trainer = HfkitTrainer(
        model, args, train_dataset=rows, optimizer=optimizer, bad_steps=BadSteps(**(bad_steps or {}))
    )
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl"))
    if steps is not None:
        trainer.add_callback(steps)
    with signals.handled():
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    return trainer


@pytest.fixture(scope="module")
def rows(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the rows that every test here trains on."""
    tokenizer = load_tokenizer(str(made / "runs/tokenizer"))
    return token_rows(str(made / "runs/data"), tokenizer, 32, "documents", tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def shared(rows: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.test_bad_steps.ROWS", rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a small model is faster so
    yield
    torch.set_num_threads(threads)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The log, read as strictly as JSON is written: NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize(("accumulation", "bad"), [(1, 4), (2, 7)])
def test_a_bad_step_changes_nothing(tmp_path: Path, optimizer: str, kind: str, accumulation: int, bad: int) -> None:
    """Step 4: neither weights nor momentum, and no weight decay; with accumulation one micro-batch is bad of two."""
    steps = Steps()
    train = {"gradient_accumulation_steps": accumulation}
    trainer = trainer_of(tmp_path / "run", [bad], kind, steps, optimizer, **train)
    assert equal(steps.before[4], steps.after[4])
    assert any(tensor.abs().sum() > 0 for state in steps.before[4][1]["state"].values() for tensor in tensors(state))
    for step in (1, 2, 3, 5, 6):
        assert not equal(steps.before[step][0], steps.after[step][0]), f"step {step} did nothing"
    assert trainer.guard.skipped == 1 and trainer.guard.in_a_row == 0
    told = [line for line in lines_of(tmp_path / "run") if "skipped" in line]
    reason = "loss is nan and gradient norm is nan" if kind == "loss" else "gradient norm is "
    assert len(told) == 1 and told[0]["step"] == 4 and told[0]["skipped_steps"] == 1
    assert told[0]["skipped"].startswith(reason) and ("loss" in told[0]["skipped"]) == (kind == "loss")


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]


def test_the_steps_after_a_bad_one_are_as_if_its_optimizer_had_done_nothing(tmp_path: Path) -> None:
    def nothing(step: int, model: torch.nn.Module) -> None:
        if step == 4:
            model.zero_grad(set_to_none=True)

    without = trainer_of(tmp_path / "without", steps=Steps(nothing))
    bad = trainer_of(tmp_path / "bad", [4])
    assert without.guard.skipped == 0 and bad.guard.skipped == 1
    assert equal(without.model.state_dict(), bad.model.state_dict())


def test_the_logged_loss_is_the_mean_of_the_good_steps(tmp_path: Path) -> None:
    """Two steps a line: both good, one bad, both bad. A window without a good step has no loss."""
    trainer_of(tmp_path / "each", [4, 5, 6])
    trainer_of(tmp_path / "pairs", [4, 5, 6], logging_steps=2)
    each = {line["step"]: line["loss"] for line in lines_of(tmp_path / "each") if "loss" in line}
    pairs = {line["step"]: line for line in lines_of(tmp_path / "pairs") if "skipped" not in line}
    assert set(each) == {1, 2, 3} and set(pairs) == {2, 4, 6}
    assert pairs[2]["loss"] == pytest.approx((each[1] + each[2]) / 2)
    assert pairs[4]["loss"] == pytest.approx(each[3]) and pairs[4]["skipped_steps"] == 1
    assert "loss" not in pairs[6] and pairs[6]["skipped_steps"] == 3
    assert pairs[6]["grad_norm"] == "nan"


def test_the_counters_survive_an_interruption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 2 and 3 are bad, the run is stopped in 3, and 4 is bad too: that makes three in a row."""
    folder = tmp_path / "run"
    settings = {"stop_after": 3}
    with pytest.raises(signals.Stopped, match="the checkpoint of step 3 is committed"):
        act = Steps(lambda step, model: terminate() if step == 2 else None)
        trainer_of(folder, [2, 3, 4], steps=act, bad_steps=settings, logging_steps=3)
    with pytest.raises(HfkitError) as caught:
        trainer_of(folder, [2, 3, 4], bad_steps=settings, logging_steps=3)
    message = str(caught.value)
    assert f"{folder}: 3 steps in a row were left out, up to step 4: loss is nan and gradient norm is nan." in message
    assert f"The weights are those after step 1; the last good checkpoint is {folder / 'checkpoint-3'}." in message
    assert "Lower train.learning_rate or train.max_grad_norm" in message
    assert "--force to go on from that checkpoint" in message and "--fresh to begin again" in message
    assert "skipped step 4: loss is nan and gradient norm is nan (3 of 3 consecutive before stopping)" in said(capsys)
    assert [line["skipped_steps"] for line in lines_of(folder) if "skipped" in line] == [1, 2, 3]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(capsys.readouterr())


def test_an_interruption_between_two_logs_keeps_what_was_skipped(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        if name == "parts":
            with pytest.raises(signals.Stopped):
                act = Steps(lambda step, model: terminate() if step == 1 else None)
                trainer_of(tmp_path / name, [2], steps=act, logging_steps=3)
            assert list(checkpoints.committed(tmp_path / name)) == [2]
        trainer_of(tmp_path / name, [2], logging_steps=3)
    keys = ("step", "loss", "skipped", "skipped_steps")
    whole, parts = (
        [{k: v for k, v in line.items() if k in keys} for line in lines_of(tmp_path / n)] for n in ("whole", "parts")
    )
    assert whole == parts and whole[1]["skipped_steps"] == 1


def test_a_spike_is_left_out(tmp_path: Path) -> None:
    """The gradient of step 24 is a thousand times too large."""

    class Spiky(HfkitTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 23:
                for parameter in self.model.parameters():
                    parameter.grad *= 1000
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_bad_steps.HfkitTrainer", Spiky)
        steps = Steps()
        settings = {"spike_sigma": 8}
        trainer = trainer_of(tmp_path / "run", steps=steps, bad_steps=settings, max_steps=26, save_strategy="no")
    assert trainer.guard.skipped == 1 and equal(steps.before[24], steps.after[24])
    told = [line["skipped"] for line in lines_of(tmp_path / "run") if "skipped" in line]
    assert len(told) == 1 and "sigma above its recent mean of" in told[0]
    assert set(trainer.guard.norms) and max(trainer.guard.norms) < 100


# ---- the command line


@pytest.fixture
def diverging(ready: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model whose loss is NaN in the training passes of this list, counted from 1."""
    bad: list[int] = []
    passes = 0
    loss_of = CrossEntropy.__call__

    def spoiled(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        return loss_of(*args) * (NAN if passes in bad else 1.0)

    monkeypatch.setattr(CrossEntropy, "__call__", spoiled)
    return bad


def test_a_run_that_diverges_ends_with_2_and_says_how_to_go_on(
    diverging: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    diverging[:] = [3, 4, 5]
    common = ["run", PRETRAIN, "train.max_steps=6", "bad_steps.stop_after=2", "prompts=[]"]
    assert cli.main(common) == 2
    message = capsys.readouterr().err
    assert "error: runs/pretrain: 2 steps in a row were left out, up to step 4: loss is nan" in message
    assert "the last good checkpoint is runs/pretrain/checkpoint-2." in message
    diverging.clear()
    assert cli.main([*common, "train.learning_rate=1e-3", "--force"]) == 0
    assert "resuming from runs/pretrain/checkpoint-2" in capsys.readouterr().out


def test_a_run_that_diverges_before_its_first_checkpoint_can_be_run_again(
    diverging: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to lose, so nothing is in the way of the corrected recipe."""
    diverging[:] = [1]
    common = ["run", PRETRAIN, "bad_steps.stop_after=1", "prompts=[]"]
    assert cli.main(common) == 2
    assert "the last good checkpoint is not yet written" in capsys.readouterr().err
    assert cli.main([*common, "train.learning_rate=1e-3"]) == 0, capsys.readouterr().err


def test_a_finished_run_says_what_was_left_out(diverging: list[int]) -> None:
    diverging[:] = [2]
    assert cli.main(["run", PRETRAIN, "prompts=[]"]) == 0
    assert (manifest.read_json(Path("runs/pretrain"), "metrics.json") or {})["skipped_steps"] == 1
    assert [line["step"] for line in read_log(Path("runs/pretrain/metrics.jsonl")) if "skipped" in line] == [2]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.save_only_model=true", "a checkpoint without the optimizer cannot go on"),
        ("train.ignore_data_skip=true", "a resumed run goes on with the row it was at"),
        ("train.auto_find_batch_size=true", "it would change the batch size unseen"),
        ("train.logging_nan_inf_filter=true", "bad steps are left out and told, see bad_steps"),
        ("train.resume_from_checkpoint=x", "an unfinished run is resumed by running it again"),
        ("train.enable_jit_checkpoint=true", "every run commits a checkpoint on SIGTERM"),
        ("train.restore_callback_states_from_checkpoint=true", "a resumed run goes on where it was"),
        ("train.train_sampling_strategy=group_by_length", "only random and sequential can go on exactly"),
        ("bad_steps.stop_after=0", "must be at least 1, got 0"),
        ("bad_steps.spike_sigma=0", "must be above 0.0, got 0"),
    ],
)
def test_what_would_break_these_promises_is_refused(
    ready: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    assert cli.main(["run", PRETRAIN, override]) == 2
    message = capsys.readouterr().err
    assert words in message and override.partition("=")[0] in message
    assert not Path("runs/pretrain").exists()
