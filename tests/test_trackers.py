"""A run that goes on reports to the run it began."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.training import trackers
from hfkit.training.callbacks import MetricsFile


def arguments(run: Path, **values: Any) -> TrainingArguments:
    run.mkdir(exist_ok=True)
    if not (run / manifest.STARTED).exists():
        manifest.write_json(run / manifest.STARTED, {"fingerprint": "x"})
    return TrainingArguments(output_dir=str(run), use_cpu=True, **values)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "COMET_EXPERIMENT_KEY", "TENSORBOARD_LOGGING_DIR", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_has_one_id_and_the_next_another(tmp_path: Path) -> None:
    ids = []
    for folder in ("one", "one", "two"):
        args = arguments(tmp_path / folder)
        trackers.take_up(args)
        ids.append(os.environ["WANDB_RUN_ID"])
        assert os.environ["COMET_EXPERIMENT_KEY"] == os.environ["SWANLAB_RUN_ID"] == ids[-1]
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / folder / "tensorboard")
        assert args.run_name == f"{folder}-{ids[-1][:8]}"
        trackers.let_go()
        assert "WANDB_RUN_ID" not in os.environ and "WANDB_RESUME" not in os.environ
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 32


def test_what_the_user_has_chosen_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    args = arguments(tmp_path / "run", run_name="my run")
    trackers.take_up(args)
    assert os.environ["WANDB_RUN_ID"] == "mine" and args.run_name == "my run"
    trackers.let_go()
    assert os.environ["WANDB_RUN_ID"] == "mine"


def test_the_id_that_mlflow_gives_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="from-the-server"))
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(active_run=lambda: run))  # type: ignore[misc]
    args = arguments(tmp_path / "run")
    trackers.take_up(args)
    assert "MLFLOW_RUN_ID" not in os.environ
    trackers.note(tmp_path / "run")
    trackers.let_go()
    trackers.take_up(args)
    assert os.environ["MLFLOW_RUN_ID"] == "from-the-server"
    trackers.let_go()


def test_an_interrupted_training_goes_on_under_its_id(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Killed(Exception):
        pass

    def note(self: MetricsFile, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seen.append(os.environ["WANDB_RUN_ID"])
        if len(seen) == 3:
            raise Killed

    monkeypatch.setattr(MetricsFile, "on_step_end", note)
    with pytest.raises(Killed):
        cli.main(["run", "recipes/pretrain.yaml"])
    assert "WANDB_RUN_ID" not in os.environ
    assert cli.main(["run", "recipes/pretrain.yaml"]) == 0
    assert len(seen) == 3 + 2 and len(set(seen)) == 1
