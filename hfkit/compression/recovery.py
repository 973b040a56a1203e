"""The training after a pruning: a distillation from the unpruned model, or a fine-tuning, with masks held."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from hfkit.artifacts.cache import beside
from hfkit.artifacts.manifest import Metrics
from hfkit.compression.calibration import sparsity_of
from hfkit.data.tokenizer import load_tokenizer
from hfkit.distillation.data import training_data
from hfkit.distillation.settings import Distillation
from hfkit.distillation.teacher import load_teacher
from hfkit.distillation.trainer import settled_trainer
from hfkit.model.loading import load_model
from hfkit.runtime.distributed import say
from hfkit.training.fit import fit, newest_checkpoint
from hfkit.training.saving import save
from hfkit.training.task_metrics import TaskMetrics
from hfkit.training.trainer import training_arguments


def recover(
    settings: Distillation,
    pruned: Path,
    data_path: str,
    teacher_path: str,
    output: Path,
    has_teacher: bool,
    has_masks: bool,
) -> Metrics:
    """Train the model in `pruned` and save it in `output`. Call it on every process.

    Args:
        teacher_path: of the unpruned model.
        has_masks: whether the weights that are 0 stay so.

    Returns:
        Numbers of the training.
    """
    checkpoint = newest_checkpoint(output)
    tokenizer = load_tokenizer(str(pruned))
    args = training_arguments(settings.train, output)
    teacher = functools.cache(lambda: load_teacher(settings, teacher_path, args.device))
    cache, width = beside(output), len(tokenizer)
    data = training_data(settings, data_path, teacher_path, tokenizer, teacher, width, cache)
    say(data.shown)
    set_seed(args.seed)
    model = load_model(str(pruned), dtype=torch.float32, trust_remote_code=settings.trust_remote_code)
    batch_size, count = args.per_device_train_batch_size, settings.evaluation_rows
    asked = (batch_size, settings.generation, settings.sequence_length, count)
    task_metrics = TaskMetrics(settings.task, data_path, tokenizer, *asked)
    trainer = settled_trainer(settings, model, data, task_metrics, output, teacher if has_teacher else None, width)
    if has_masks:
        trainer.add_callback(HoldMasks(model))
    metrics = fit(trainer, output, checkpoint, data.tokens_a_row, settings.sequence_length)
    save(trainer, tokenizer, output)
    seconds = metrics.pop("train_seconds")
    results = {name: value for name, value in metrics.items() if name not in ("device", "seed")}
    return {f"recovery_{name}": value for name, value in results.items()} | {"train_seconds": seconds}


class HoldMasks(TrainerCallback):
    """Sets the weights that were zero when the training began, or went on, to zero again after each step."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.kept = list[tuple[torch.Tensor, torch.Tensor]]()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights: list[Any] = [self.model.get_submodule(name).weight for name in sparsity_of(self.model)]
        self.kept = [(weight, weight != 0) for weight in weights]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for weight, mask in self.kept:
            weight.mul_(mask)
