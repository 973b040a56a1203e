"""A run that was interrupted anywhere and goes on ends where an uninterrupted one does: same log, same weights."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfkit.artifacts import manifest
from hfkit.data.rows.packing import PackedRows
from hfkit.errors import HfkitError
from hfkit.training import checkpoints, decisions
from hfkit.training.callbacks import read_log
from hfkit.training.order import EpochOrder
from hfkit.training.trainer import training_arguments
from tests import interrupting
from tests.interrupting import (
    PRETRAIN,
    Act,
    Killed,
    at,
    interrupted,
    kill,
    quick_world,
    result,
    run,
    terminate,
    train_adapter,
)
from tests.kit import on_two

# 71 rows, filled up to 3 steps of 24 rows an epoch; 9 steps are 3 epochs. Dropout draws random numbers all along.
SMALL = ["sequence_length=128", "train.per_device_train_batch_size=24", "train.save_steps=2"]
COMMON = [*SMALL, "model.attention_dropout=0.1"]
NINE = [*COMMON, "train.max_steps=9"]
HALVES = ["train.per_device_train_batch_size=12", "train.gradient_accumulation_steps=2"]
WORKERS = "train.dataloader_num_workers=2"
EVALUATED = ["train.eval_strategy=steps", "train.eval_steps=2"]
# The best is the one with the highest loss: that of the first evaluation, at step 2.
BEST = [*EVALUATED, "train.load_best_model_at_end=true", "train.metric_for_best_model=eval_loss"]
BEST += ["train.greater_is_better=true", "train.save_total_limit=1"]
BY_EPOCH = [f"train.{kind}_strategy=epoch" for kind in ("eval", "save", "logging")]
EPOCHS = [*COMMON, "train.max_steps=-1", "train.num_train_epochs=3", *BY_EPOCH]


@pytest.fixture(scope="module", autouse=True)
def world(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One world for all tests here, so that they share the uninterrupted runs."""
    with quick_world(made, tmp_path_factory.mktemp("resume") / "world") as folder:
        yield folder


@functools.cache
def whole(*options: str) -> dict[str, Any]:
    """The result of the uninterrupted run with these options."""
    output = f"whole-{abs(hash(options))}"
    assert run(*options, output=output) == 0
    return result(output)


@pytest.fixture
def output(request: pytest.FixtureRequest) -> str:
    """A folder of its own for each test."""
    return f"parts-{abs(hash(request.node.name))}"


# ---- one process

PLACES = [
    (NINE, "on_step_end", 1, kill),  # nothing is committed yet
    (NINE, "on_step_end", 5, kill),  # goes on from 4, in the second epoch
    (NINE, "on_step_end", 7, kill),  # goes on from 6, at the end of an epoch
    (NINE, "on_step_begin", 3, terminate),  # commits 3, at the end of the first epoch
    (NINE, "on_step_begin", 5, terminate),
    (NINE, "on_step_begin", 8, terminate),  # in the third epoch
    (NINE, "on_step_begin", 9, terminate),  # the last step of all
    (NINE, "on_train_end", 9, terminate),
    (NINE, "evaluation", 9, terminate),
    ([*NINE, "optimizer=muon", *HALVES, WORKERS, "train.logging_steps=3"], "on_step_end", 5, kill),
    ([*NINE, "optimizer=muon", *HALVES, WORKERS, "train.logging_steps=3"], "on_step_begin", 5, terminate),
    ([*NINE, "optimizer=muon", *HALVES, WORKERS, "train.logging_steps=3"], "on_step_begin", 6, terminate),
    ([*NINE, *HALVES, "train.logging_steps=4"], "on_substep_end", 4, terminate),
    ([*NINE, *EVALUATED], "on_step_begin", 5, terminate),
    ([*NINE, WORKERS, *EVALUATED], "evaluation", 4, terminate),
    ([*NINE, *EVALUATED], "evaluation", 6, terminate),  # at the end of an epoch
    ([*NINE, *EVALUATED], "evaluation", 9, terminate),  # of the last step, at the end of an epoch
    ([*NINE, *EVALUATED], "on_step_begin", 9, terminate),
    ([*COMMON, "train.max_steps=8", *EVALUATED], "evaluation", 8, terminate),  # of the last step, inside an epoch
    (EPOCHS, "on_step_begin", 2, terminate),
    (EPOCHS, "on_step_begin", 6, terminate),  # the end of the epoch, with its log and evaluation, is due
    (EPOCHS, "evaluation", 6, terminate),
    (EPOCHS, "evaluation", 6, kill),
    (EPOCHS, "on_step_begin", 9, terminate),
    ([*EPOCHS, "train.save_strategy=steps"], "evaluation", 6, kill),  # after the checkpoint of the step
]


def place_name(place: Any) -> str:
    if isinstance(place, list):
        return "epochs" if "train.max_steps=-1" in place else " ".join(place[4:]).replace("train.", "")
    return place.__name__ if callable(place) else str(place)


@pytest.mark.parametrize(("options", "event", "step", "act"), PLACES, ids=place_name)
def test_an_interrupted_run_ends_where_a_whole_one_does(
    output: str, options: list[str], event: str, step: int, act: Act
) -> None:
    interrupted(*options, output=output, event=event, step=step, act=act)
    assert run(*options, output=output) == 0
    found, expected = result(output), whole(*options)
    assert found["log"] == expected["log"]
    assert found["weights"] == expected["weights"]


@pytest.mark.parametrize("event", ["on_step_begin", "evaluation"])
def test_a_signal_commits_the_step_it_is_in(output: str, capsys: pytest.CaptureFixture[str], event: str) -> None:
    options = [*NINE, *EVALUATED]
    interrupted(*options, output=output, event=event, step=4, act=terminate)
    said = capsys.readouterr().err
    assert "stopped by SIGTERM: the checkpoint of step 4 is committed; rerun the same command to resume" in said
    assert checkpoints.newest(Path(f"runs/{output}")) == Path(f"runs/{output}/checkpoint-4")
    with at("on_step_end", 5, kill), pytest.raises(Killed):
        run(*options, output=output)
    assert f"resuming from runs/{output}/checkpoint-4" in capsys.readouterr().out


def test_a_run_may_be_interrupted_again_and_again(output: str) -> None:
    options = [*NINE, *EVALUATED]
    for event, step, act in (
        ("on_step_end", 1, kill),
        ("on_step_begin", 2, terminate),
        ("evaluation", 2, terminate),  # which was due when it went on
        ("evaluation", 2, kill),
        ("on_step_begin", 5, terminate),
        ("on_step_end", 7, kill),
        ("evaluation", 8, terminate),
    ):
        interrupted(*options, output=output, event=event, step=step, act=act)
    assert run(*options, output=output) == 0
    assert result(output) == whole(*options)


def test_what_a_kill_after_a_late_evaluation_leaves_in_the_log_is_not_there_twice(output: str) -> None:
    """The evaluation is made when the run goes on, written, and the run killed before its next checkpoint."""
    options = [*NINE, *EVALUATED]
    interrupted(*options, output=output, event="evaluation", step=4, act=terminate)
    interrupted(*options, output=output, event="on_step_end", step=5, act=kill)
    assert run(*options, output=output) == 0
    assert result(output)["log"] == whole(*options)["log"]


def test_the_end_of_a_run_knows_its_beginning(output: str) -> None:
    """Gone on from its very last checkpoint, it still tells the time of its training."""
    interrupted(*NINE, output=output, event="evaluation", step=9, act=kill)
    before = manifest.read_json(Path(f"runs/{output}/checkpoint-9"), "progress_0.json") or {}
    assert run(*NINE, output=output) == 0
    assert result(output) == whole(*NINE)
    after = manifest.read_json(Path(f"runs/{output}"), "metrics.json") or {}
    assert after["train_seconds"] >= round(before["train_seconds"], 1) > 0


def test_the_steps_that_are_told_are_those_that_are_made(output: str) -> None:
    """Every epoch is filled up to whole steps: 4 of 20 rows for 71."""
    options = ["train.max_steps=-1", "train.num_train_epochs=3", "train.per_device_train_batch_size=20"]
    assert run(*SMALL, *options, output=output) == 0
    made = read_log(Path(f"runs/{output}/metrics.jsonl"))[-1]["step"]
    assert manifest.read_json(Path(f"runs/{output}"), "metrics.json")["steps"] == made == 12  # type: ignore[index]


# ---- the best checkpoint


@pytest.mark.parametrize(
    ("event", "step", "act"),
    [("on_step_end", 7, kill), ("evaluation", 2, terminate), ("evaluation", 6, kill), ("evaluation", 8, terminate)],
    ids=place_name,
)
def test_the_best_weights_survive_an_interruption(output: str, event: str, step: int, act: Act) -> None:
    options = [*COMMON, "train.max_steps=8", *BEST]
    assert whole(*options)["weights"] != whole(*options[: -len(BEST)])["weights"], "the last weights are the best"
    interrupted(*options, output=output, event=event, step=step, act=act)
    assert run(*options, output=output) == 0
    assert result(output) == whole(*options)


def test_rotation_respects_the_best_checkpoint(output: str) -> None:
    options = [*COMMON, "train.max_steps=8", *BEST]
    interrupted(*options, output=output, event="evaluation", step=8, act=kill)
    assert list(checkpoints.committed(Path(f"runs/{output}"))) == [2, 6]


def test_a_best_evaluation_without_a_checkpoint_does_not_end_the_run(output: str) -> None:
    """transformers allows checkpoints at a multiple of the evaluations: the best one may have none."""
    options = [*COMMON, "train.max_steps=8", *BEST, "train.save_steps=8"]
    assert run(*options, output=output) == 0


# ---- EpochOrder


def test_an_epoch_has_every_row_once_and_is_filled_up_from_its_beginning() -> None:
    order = EpochOrder(71, 24, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        orders.append(list(order))
    assert orders[0] == orders[2] != orders[1] and len(order) == len(orders[0]) == 72
    for each in orders:
        assert sorted(each[:71]) == list(range(71)) and each[71:] == each[:1]
    assert list(EpochOrder(5, 4, seed=None)) == [0, 1, 2, 3, 4, 0, 1, 2]
    assert list(EpochOrder(2, 7, seed=None)) == [0, 1, 0, 1, 0, 1, 0]
    assert list(EpochOrder(71, 24, seed=2)) != orders[0]


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(1, 4, 2), (1, 8, 1), (2, 4, 1), (4, 1, 2)])
def test_each_step_has_the_same_rows_for_any_number_of_processes(
    processes: int, batch: int, accumulation: int
) -> None:
    """Dealt by Accelerate's own shards, in whole batches in turn."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    order = EpochOrder(71, 8, seed=1)
    order.set_epoch(2)
    dealt = [
        list(BatchSamplerShard(BatchSampler(order, batch, drop_last=False), processes, index))
        for index in range(processes)
    ]
    rows = list(order)
    for step in range(len(order) // 8):
        part = slice(step * accumulation, (step + 1) * accumulation)
        read = [row for each in dealt for rows_of_batch in each[part] for row in rows_of_batch]
        assert sorted(read) == sorted(rows[8 * step : 8 * step + 8])


@pytest.mark.parametrize(
    ("processes", "now", "batch", "accumulation"),
    [(2, 1, 4, 2), (1, 2, 4, 1), (1, 3, None, None), (1, 8, 1, 1), (4, 2, 4, 1)],
)
def test_a_step_keeps_its_rows_on_another_number_of_processes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: int,
    now: int,
    batch: int | None,
    accumulation: int | None,
) -> None:
    args = training_arguments({"per_device_train_batch_size": 4}, tmp_path)
    monkeypatch.setattr(type(args), "world_size", property(lambda self: now))
    decided = {"rows_a_step": 8, "processes": processes}
    if batch is None:
        with pytest.raises(
            HfkitError, match=f"begun with 8 rows a step on {processes} processes, and 3 cannot"
        ) as told:
            decisions.batches_for(decided, args)
        assert "with 1 processes again, or another divisor of 8" in str(told.value)
        return
    found = decisions.batches_for(decided, args)
    if batch * now == 8 and args.train_batch_size == batch:
        assert found == {} and capsys.readouterr().out == ""  # nothing is to be changed
    else:
        assert found == {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert (
            f"begun on {processes} process{'es' * (processes > 1)}, going on with {now}: each step has the same 8 rows"
            in capsys.readouterr().out
        )


# ---- two processes

CPU = "train.use_cpu=true"


def stopped_on_two(*options: str, output: str, step: int) -> None:
    """Stopped by a signal to the second process alone: the two must agree on it."""
    keys = [*options, CPU, "prompts=[]", f"output_dir=runs/{output}"]
    done = on_two(interrupting.__file__, str(step), "run", PRETRAIN, *keys)
    assert f"the checkpoint of step {step} is committed" in done.stderr, done.stderr
    assert done.returncode != 0 and list(checkpoints.committed(Path(f"runs/{output}")))[-1] == step


def whole_on_two(*options: str) -> dict[str, Any]:
    name = f"two-{abs(hash(options))}"
    done = on_two("run", PRETRAIN, *options, CPU, "prompts=[]", f"output_dir=runs/{name}")
    assert done.returncode == 0, done.stderr
    return result(name)


def test_two_processes_go_on_exactly_in_the_second_epoch(output: str) -> None:
    """Accelerate loses the epoch where it skips batches on several processes."""
    options = [*COMMON, "train.max_steps=9", "train.per_device_train_batch_size=12", "train.logging_steps=3"]
    expected = whole_on_two(*options)
    stopped_on_two(*options, output=output, step=5)
    done = on_two("run", PRETRAIN, *options, CPU, "prompts=[]", f"output_dir=runs/{output}")
    assert done.returncode == 0, done.stderr
    assert f"resuming from runs/{output}/checkpoint-5" in done.stdout
    assert result(output) == expected


PLAIN = [*SMALL, "train.max_steps=9", "train.logging_steps=3", "train.use_cpu=true"]


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same rows at each step: another rounding is all that may differ."""
    assert [line["step"] for line in found["log"]] == [line["step"] for line in expected["log"]] == [3, 6, 9]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[key] for line in found["log"]], [line[key] for line in expected["log"]], rtol=1e-4, err_msg=key
        )


def test_a_run_begun_on_two_processes_goes_on_with_one(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*PLAIN, "train.per_device_train_batch_size=12"]
    stopped_on_two(*options, output=output, step=5)
    assert run(*options, output=output) == 0
    assert "begun on 2 processes, going on with 1: each step has the same 24 rows" in capsys.readouterr().out
    assert_near(result(output), whole(*PLAIN))


def test_a_run_begun_on_one_process_goes_on_with_two(output: str) -> None:
    interrupted(*PLAIN, output=output, event="on_step_begin", step=5, act=terminate)
    done = on_two("run", PRETRAIN, *PLAIN, "prompts=[]", f"output_dir=runs/{output}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun on 1 process, going on with 2: each step has the same 24 rows, 12 in a batch") == 1
    assert_near(result(output), whole(*PLAIN))


# ---- LoRA


@pytest.mark.parametrize("train", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 12}])
def test_an_adapter_goes_on_exactly(world: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    """With dropout, from the middle and from the end of the second epoch; its checkpoints hold the adapter alone."""
    whole(*NINE)  # for its rows
    rows = PackedRows(next((world / "runs/.cache").glob("tokens-*/tokens.json")).parent, "train")
    expected = train_adapter(rows, tmp_path / "whole", **train)
    for step in (5, 7):
        with pytest.raises(Killed):
            train_adapter(rows, tmp_path / "parts", stop_at=step, **train)
    assert list(checkpoints.committed(tmp_path / "parts")) == [4, 6]
    assert not list((tmp_path / "parts").glob("checkpoint-*/model.safetensors"))
    assert train_adapter(rows, tmp_path / "parts", **train) == expected
