"""The end of a training: numbers on rows never trained on, and the folder."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, TaskType
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast

from hfkit.artifacts import manifest
from hfkit.model.heads import TRAINING_ONLY, causal_of
from hfkit.runtime.distributed import on_main
from hfkit.training import checkpoints
from hfkit.training.callbacks import draw_loss, read_log
from hfkit.training.trainer import HfkitTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(trainer: Any, validation: Any, test: Any) -> dict[str, float]:
    """Return what `trainer.evaluate` gives for the test split by its bare name, such as `loss`, and for validation."""
    on_validation = trainer.evaluate(validation, metric_key_prefix="validation")
    on_test = trainer.evaluate(test, metric_key_prefix="test")
    return {name.removeprefix("test_"): value for name, value in on_test.items()} | on_validation


def save(trainer: HfkitTrainer, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Put the model, its code and its tokenizer into the folder, each file whole. Returns their size in bytes."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process has its part in it
    with checkpoints.disk_errors(folder):
        return on_main("save", lambda: _save_files(trainer, state_dict, tokenizer, folder))


def _save_files(
    trainer: HfkitTrainer, state_dict: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> int:
    work = folder / f".result{manifest.PARTIAL}"
    shutil.rmtree(work, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(TRAINING_ONLY)}
    for tied in model.all_tied_weights_keys:  # gathered from several processes it is a copy, no longer the same tensor
        weights.pop(tied, None)
    with _unsharded_class(causal_of(model)):
        model.save_pretrained(work, state_dict=weights)
    if isinstance(model, PeftModel) and model.active_peft_config.task_type == TaskType.SEQ_CLS:
        model.config.save_pretrained(work)  # with the names of the classes, which the base does not have
    elif isinstance(model, PeftModel):
        model.generation_config.save_pretrained(work)  # with the end of a turn, which the base does not have
    tokenizer.save_pretrained(work)
    manifest.sync_tree(work)
    size = 0
    for path in sorted(work.iterdir()):
        size += path.stat().st_size
        path.replace(folder / path.name)
    work.rmdir()
    draw_loss(read_log(folder / "metrics.jsonl"), folder / "loss.png")
    return size


@contextlib.contextmanager
def _unsharded_class(model: "PreTrainedModel") -> Iterator[None]:
    """Restore a model's own class: FSDP2 gives it another, beside whose code that of the model would not be saved."""
    kind = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = kind.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = kind
