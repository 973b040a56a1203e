"""Runs that are interrupted, for the tests of resumption: a recipe in this process, one on two, and a LoRA adapter.

As a script it is `hfkit` with a signal to the last process in a step: `torchrun tests/interrupting.py STEP run ...`.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.runtime import signals
from hfkit.training import checkpoints, decisions, saving
from hfkit.training.callbacks import MetricsFile, read_log
from hfkit.training.trainer import HfkitTrainer, training_arguments

PRETRAIN = "recipes/pretrain.yaml"
Act = Callable[[], None]


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def quick_world(made: Path, folder: Path) -> Iterator[Path]:
    """A copy of a world as the working directory, in which a run does not measure, draw or wait for its threads."""
    shutil.copytree(made, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(decisions, "matmul_flops", lambda device, dtype: 1e12)
        patch.setattr(saving, "draw_loss", lambda log, path: None)
        yield folder
    torch.set_num_threads(threads)


@contextlib.contextmanager
def at(event: str, step: int, act: Act) -> Iterator[None]:
    """Do `act` at a step: at an event of a callback, or when an `evaluation` begins."""

    def event_of_step(self: Any, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # At the begin of a step, and inside it, its number is not counted yet.
        is_counted = event not in ("on_step_begin", "on_substep_end")
        if state.global_step + (not is_counted) == step:
            act()

    evaluate = HfkitTrainer._token_sums

    def evaluation(self: HfkitTrainer, *args: Any) -> tuple[float, int]:
        if self.state.global_step == step:
            act()
        return evaluate(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        if event == "evaluation":
            patch.setattr(HfkitTrainer, "_token_sums", evaluation)
        else:
            patch.setattr(MetricsFile, event, event_of_step)
        yield


def run(*options: str, output: str) -> int:
    """Run the recipe; options of the command line may stand among its keys."""
    return cli.main(["run", PRETRAIN, *options, "prompts=[]", f"output_dir=runs/{output}"])


def interrupted(*options: str, output: str, event: str, step: int, act: Act) -> None:
    with at(event, step, act):
        if act is kill:
            with pytest.raises(Killed):
                run(*options, output=output)
        else:
            assert run(*options, output=output) == 75
    assert not Path(f"runs/{output}/hfkit.json").exists()


def result(output: str) -> dict[str, Any]:
    """What must be the same: what each step computed, each evaluation, and the weights."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "skipped")
    log = [{key: line[key] for key in keys if key in line} for line in read_log(Path(f"runs/{output}/metrics.jsonl"))]
    return {"log": log, "weights": manifest.sha256_of(Path(f"runs/{output}/model.safetensors"))}


def train_adapter(rows: Any, folder: Path, stop_at: int | None = None, **train: Any) -> dict[str, Any]:
    """Train a LoRA adapter, from the newest checkpoint in the folder. Returns its log and its SHA-256."""
    from peft import LoraConfig, get_peft_model

    from hfkit.model import HfkitConfig, HfkitForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    torch.manual_seed(0)
    base = HfkitForCausalLM(HfkitConfig(vocab_size=320, **shape))
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    values = {"max_steps": 9, "per_device_train_batch_size": 24, "learning_rate": 1e-2, "logging_steps": 1}
    values |= {"save_steps": 2, "save_total_limit": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = HfkitTrainer(model, training_arguments({**values, **train}, folder), train_dataset=rows)
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl"))
    found = checkpoints.newest(folder)
    with signals.handled(), at("on_step_end", stop_at, kill) if stop_at else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    model.save_pretrained(folder / "adapter")
    lines = [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(folder / "metrics.jsonl")]
    return {"log": lines, "weights": manifest.sha256_of(folder / "adapter/adapter_model.safetensors")}


def main() -> int:
    def stop(self: Any, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step + 1 == int(sys.argv[1]) and args.process_index == args.world_size - 1:
            terminate()

    MetricsFile.on_step_begin = stop
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
