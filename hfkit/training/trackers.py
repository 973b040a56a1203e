"""Experiment trackers: a run that goes on reports to the run it began, not to a new one."""

import os
import sys
import uuid
from pathlib import Path

from transformers import TrainingArguments

from hfkit.artifacts import manifest
from hfkit.runtime.distributed import is_main

_given: set[str] = set()  # names of the variables set here


def take_up(args: TrainingArguments) -> None:
    """Give the trackers the id of this run: the one in its folder, or a new one that is kept there.

    They read it from the environment when Trainer makes their callbacks. What the user has set there stands.
    """
    run = Path(args.output_dir or ".")
    started = manifest.read_json(run, manifest.STARTED)
    if not is_main() or started is None:
        return
    if "run_id" not in started:
        started["run_id"] = uuid.uuid4().hex
        manifest.write_json(run / manifest.STARTED, started)
    run_id = started["run_id"]
    args.run_name = args.run_name or f"{run.name}-{run_id[:8]}"  # Trackio knows runs by their name
    variables = {
        "WANDB_RUN_ID": run_id,
        "WANDB_RESUME": "allow",
        "SWANLAB_RUN_ID": run_id,
        "SWANLAB_RESUME": "allow",
        "COMET_EXPERIMENT_KEY": run_id,
        "TENSORBOARD_LOGGING_DIR": str(run / "tensorboard"),
        "MLFLOW_RUN_ID": started.get("mlflow_run_id"),  # chosen by its server, see `note`
    }
    for name, value in variables.items():
        if value is not None and name not in os.environ:
            _given.add(name)
            os.environ[name] = value


def note(run: Path) -> None:
    """Keep the id that MLflow's server has given to this run."""
    mlflow = sys.modules.get("mlflow")
    active = mlflow.active_run() if mlflow is not None else None
    started = manifest.read_json(run, manifest.STARTED)
    if active is not None and started is not None and "mlflow_run_id" not in started:
        manifest.write_json(run / manifest.STARTED, {**started, "mlflow_run_id": active.info.run_id})


def let_go() -> None:
    """End this run's part: the next training of this process is another run."""
    while _given:
        os.environ.pop(_given.pop(), None)
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.finish()
