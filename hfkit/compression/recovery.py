"""The training after a pruning: a distillation from the unpruned model, or a fine-tuning, with masks held."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from hfkit.compression.calibration import sparsity_of
from hfkit.data.tasks import TaskRecipe
from hfkit.data.tokenizer import load_tokenizer
from hfkit.distillation.data import training_data
from hfkit.distillation.settings import Loss, Targets
from hfkit.distillation.teacher import load_teacher
from hfkit.distillation.trainer import settled_trainer
from hfkit.model.loading import load_model
from hfkit.runtime.distributed import say
from hfkit.training.fit import fit, newest_checkpoint
from hfkit.training.saving import save
from hfkit.training.settings import BadSteps, Optimizer
from hfkit.training.task_metrics import TaskMetrics
from hfkit.training.trainer import training_arguments

OF_RECIPE = (
    "stage",
    "task",
    "prompt",
    "completion",
    "messages",
    "tools",
    "chat_template",
    "label",
    "generation",
    "trust_remote_code",
)
OF_TRAINING = ("sequence_length", "train", "bad_steps")


class Recovery(TaskRecipe):
    """What a distillation is told, from the recipe of a pruning."""

    generation: dict[str, Any]
    trust_remote_code: bool
    sequence_length: int
    train: dict[str, Any]
    bad_steps: BadSteps
    losses: list[Loss]
    optimizer: Optimizer
    packing: str
    targets: Targets = Targets()
    evaluation_rows: int = 50
    cross_tokenizer: None = None
    teacher_quantization: None = None


def recover(recipe: Any, pruned: Path, places: dict[str, str], output: Path) -> dict[str, Any]:
    """Train the model in `pruned` and save it in `output`. Call it on every process.

    Returns:
        Numbers of the training.
    """
    told = {name: getattr(recipe, name) for name in (*OF_RECIPE, *OF_TRAINING)}
    recovery = Recovery(**told, **{name: getattr(recipe.recover, name) for name in ("losses", "optimizer", "packing")})
    checkpoint = newest_checkpoint(output)
    tokenizer: Any = load_tokenizer(str(pruned))
    args = training_arguments(recovery.train, output)
    teacher = functools.cache(lambda: load_teacher(recovery, places["model"], args.device))
    data = training_data(recovery, places, tokenizer, teacher, len(tokenizer), output.parent / ".cache")
    say(data.shown)
    set_seed(args.seed)
    trust = recovery.trust_remote_code
    model: Any = load_model(str(pruned), recovery.task, dtype=torch.float32, trust_remote_code=trust)
    metrics = TaskMetrics(recovery, places["data"], tokenizer, args.per_device_train_batch_size)
    given = teacher if recipe.recover.has_teacher else None
    trainer = settled_trainer(recovery, model, data, metrics, output, given, len(tokenizer))
    if recipe.pruning.is_mask:
        trainer.add_callback(HoldMasks(model))
    found = fit(trainer, output, checkpoint, data.tokens_a_row, recovery.sequence_length)
    save(trainer, tokenizer, output)
    seconds = found.pop("train_seconds")
    told = {name: value for name, value in found.items() if name not in ("device", "seed")}
    return {f"recovery_{name}": value for name, value in told.items()} | {"train_seconds": seconds}


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
        for weight, kept in self.kept:
            weight.mul_(kept)
