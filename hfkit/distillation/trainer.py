"""The trainer of students: the teacher is asked for each batch, and may score what the student wrote itself."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

from hfkit.artifacts.manifest import Json, Metrics
from hfkit.data.rows.examples import pad
from hfkit.data.rows.learned import BOUNDS
from hfkit.data.rows.packing import IGNORED
from hfkit.distillation.data import TrainingData
from hfkit.distillation.objective import Objective
from hfkit.distillation.settings import Distillation
from hfkit.distillation.teacher import INPUTS, Teacher, placed
from hfkit.inference.batches import padded
from hfkit.inference.generation import generating_with
from hfkit.model.heads import causal_of, portable_attention
from hfkit.recipe.fields import Arguments
from hfkit.training.compilation import uncompiled
from hfkit.training.decisions import settle
from hfkit.training.task_metrics import TaskMetrics
from hfkit.training.trainer import HfkitTrainer

STEPS_APART = 1_000_003  # of the seeds of two runs, more than any run has steps


class DistillationTrainer(HfkitTrainer):
    """HfkitTrainer whose loss is an `Objective`.

    Args:
        teacher: None where the batches hold its targets, or none are needed.
        on_policy_share: the share of steps whose completions the student writes (GKD, arXiv 2306.13649, lambda).
        generation: arguments of `GenerationConfig` for that, `pad_token_id` and `eos_token_id` among them.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        teacher: Teacher | None = None,
        on_policy_share: float = 0.0,
        generation: Arguments | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, loss_of=objective, **kwargs)
        self.objective, self.teacher = objective, teacher
        self.on_policy_share, self.generation = on_policy_share, generation or {}
        self._parts: dict[str, torch.Tensor] = {}  # of the step, each loss as a mean over its tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        with self.accelerator.autocast():
            self.objective.prepare(inputs, self.teacher)
        inputs = {name: inputs[name] for name in (*INPUTS, *BOUNDS, "labels") if name in inputs}
        loss = super().compute_loss(model, inputs | self.objective.options(), return_outputs, num_items_in_batch)
        items: Any = num_items_in_batch
        for name, part in self.objective.parts.items():
            self._parts[name] = self._parts.get(name, 0) + part.float() / items
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        self._parts = {}
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Drawn by the step alone: all processes agree, as they count their tokens together, and so does a resumed run.
        generator = torch.Generator().manual_seed(self.args.seed * STEPS_APART + self.state.global_step)
        if torch.rand((), generator=generator).item() >= self.on_policy_share:
            return batches, items
        batches = [self._written_by_student(self._prepare_inputs(batch)) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def log(self, logs: Metrics, start_time: float | None = None) -> None:
        if "loss" in logs and len(self._parts) > 1:
            sums = self.accelerator.reduce(torch.stack(list(self._parts.values())), "sum").tolist()
            logs |= {f"loss_{name}": value for name, value in zip(self._parts, sums, strict=True)}
        super().log(logs, start_time)

    @torch.no_grad()
    def _written_by_student(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the batch with the completions that the student writes after its prompts, which then are what is
        learned."""
        device, pad_id = batch["input_ids"].device, self.generation["pad_token_id"]
        is_prompt = batch["attention_mask"].bool() & ((batch["labels"] != IGNORED).cumsum(-1) == 0)
        prompts = [ids[flags].tolist() for ids, flags in zip(batch["input_ids"], is_prompt, strict=True)]
        ids, mask = padded(prompts, pad_id, "left")
        model: Any = causal_of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        # From the whole distribution, as GKD samples: of a top_k that is left open `generate` makes 50.
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": self._room(batch, prompts, model)}
        config = GenerationConfig(**{**options, **self.generation})
        was_training = model.training
        model.eval()
        with generating_with(model, config), portable_attention(model), uncompiled():
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        model.train(was_training)
        completions = output[:, ids.shape[1] :]
        ends = [] if config.eos_token_id is None else config.eos_token_id
        stops = torch.isin(completions, torch.as_tensor(ends, device=device))
        lengths = (stops.cumsum(-1) - stops.long() == 0).sum(-1).tolist()  # up to the first end, with it
        examples = []
        for prompt, row, length in zip(prompts, completions, lengths, strict=True):
            context, learned = torch.tensor(prompt, device=device), row[:length]
            labels = torch.cat([torch.full_like(context, IGNORED), learned])
            examples.append({"input_ids": torch.cat([context, learned]), "labels": labels})
        return pad(examples, pad_id)

    def _room(self, batch: dict[str, torch.Tensor], prompts: list[list[int]], model: "PreTrainedModel") -> int:
        """Return how many tokens are written where the recipe does not say it: as many as the data's own longest row
        has behind the shortest prompt, within the model's positions."""
        lengths = [len(prompt) for prompt in prompts]
        room = batch["input_ids"].shape[1] - min(lengths)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return max(1, room if positions is None else min(room, positions - max(lengths)))


def student_trainer(
    settings: Distillation,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: TrainingData,
    task_metrics: TaskMetrics,
    teacher: Callable[[], PreTrainedModel] | None,
    width: int,
    decided: Json | None = None,
) -> HfkitTrainer:
    """Return the trainer of a student; without a teacher, with cross-entropy alone.

    Args:
        teacher: loads the model; called only if it runs beside the student.
    """
    sample = partial(task_metrics, model, "validation") if settings.task.has_answers else None
    common: dict[str, Any] = {
        "optimizer": settings.optimizer,
        "decided": decided,
        "task_metrics": sample,
        "bad_steps": settings.bad_steps,
        "eval_dataset": data.validation,
    }
    if teacher is None or settings.targets.source == "generated":
        rows, collate = (data.alone, data.collate_alone) if teacher is None else (data.train, data.collate)
        return HfkitTrainer(model, args, train_dataset=rows, data_collator=collate, **common)
    is_beside = settings.targets.source != "cached"
    teacher_model = teacher() if is_beside else None
    compiled = bool((decided or {}).get("torch_compile", args.torch_compile))
    config = teacher_model.config.get_text_config() if teacher_model is not None else None
    objective = Objective(settings.losses, model, config, width, compiled)
    trainer = DistillationTrainer(
        model,
        args,
        objective=objective,
        on_policy_share=settings.targets.share if settings.targets.source == "on_policy" else 0.0,
        generation=data.generation,
        train_dataset=data.train,
        data_collator=data.collate,
        **common,
    )
    if teacher_model is not None:
        teacher_model = placed(teacher_model, trainer.accelerator)
        trainer.teacher = Teacher(teacher_model, objective.watched(1), objective.options(), compiled)
    return trainer


def settled_trainer(
    settings: Distillation,
    model: PreTrainedModel,
    data: TrainingData,
    task_metrics: TaskMetrics,
    output: Path,
    teacher: Callable[[], PreTrainedModel] | None = None,
    width: int = 0,
) -> HfkitTrainer:
    """Return the trainer of a student, with a teacher or alone.

    Args:
        teacher, width: see `student_trainer`.
    """
    between_layers = teacher is not None and any(loss.spec.compares == "layers" for loss in settings.losses)
    train = {"torch_compile": False, **settings.train} if between_layers else settings.train  # its graph would break
    optimizer = settings.optimizer.name
    what = f"{optimizer}, learning from " + ("the data alone" if teacher is None else "its teacher")
    args, decided = settle(
        train, output, model, data.alone, lambda count: f"{count} rows, {what}", data.collate_alone, optimizer
    )
    return student_trainer(settings, model, args, data, task_metrics, teacher, width, decided)
