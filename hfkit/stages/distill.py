"""Distil a teacher into a smaller student, and tell what that was worth."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts.cache import beside
from hfkit.artifacts.manifest import Metrics
from hfkit.data.tasks import about_tasks
from hfkit.data.tasks.keys import DistilledTask, TaskRecipe
from hfkit.data.tokenizer import load_tokenizer
from hfkit.distillation.settings import Distillation, FromTeacher, Loss, Targets
from hfkit.metrics.catalogue import scores_of_training
from hfkit.recipe import limits
from hfkit.recipe.fields import Input, Push, ResolvedInputs, Section
from hfkit.recipe.limits import Accept
from hfkit.runtime.distributed import on_main, say
from hfkit.training.settings import TRAIN, AnyOptimizer, BadSteps, Optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfkit.distillation.data import TrainingData
    from hfkit.training.task_metrics import TaskMetrics

_FROM_TOKENIZER = "it is the tokenizer's"


class Recipe(TaskRecipe):
    """A student that learns from a teacher: from its distributions, its layers, or what it writes."""

    MAKES: ClassVar[str] = "model"
    DISTRIBUTED: ClassVar[bool] = True
    SUMMARY: ClassVar[str] = "A small language model that has learned from a larger one{adapter}."

    stage: Literal["distill"]
    teacher: Annotated[str, Input("model")]
    student: Annotated[
        str | dict[str, Any],
        Input("model"),
        Section(
            "hfkit.model.configuration_hfkit.HfkitConfig",
            (("pad_token_id", _FROM_TOKENIZER), ("bos_token_id", _FROM_TOKENIZER), ("eos_token_id", _FROM_TOKENIZER)),
            (("from_teacher", FromTeacher),),
        ),
    ]
    tokenizer: Annotated[str | None, Input("tokenizer")] = pydantic.Field(
        None, description="Of the student. By default its own, or the teacher's for a new student."
    )
    data: Annotated[str, Input("data set")]
    task: DistilledTask = pydantic.Field("text", description=about_tasks("distill"))
    sequence_length: int = pydantic.Field(512, ge=8, description="Tokens in a row of the batch.")
    packing: Literal["documents", "concatenate"] = pydantic.Field(
        "documents", description="Of `task: text`, as in pretrain. Examples of a task never see one another."
    )
    losses: list[Loss] = pydantic.Field(
        [Loss(loss="cross_entropy", weight=0.5), Loss(loss="forward_kl", weight=0.5)],
        min_length=1,
        description="What is learned: the weighted sum of these.",
    )
    targets: Targets = pydantic.Field(Targets(), description="Where the teacher's signal comes from.")
    cross_tokenizer: Literal["uld"] | None = pydantic.Field(
        None, description="Allow teacher and student different tokenizers, compared by `loss: uld`."
    )
    teacher_quantization: Annotated[dict[str, Any] | None, Section("transformers.BitsAndBytesConfig")] = None
    lora: Annotated[dict[str, Any] | None, Section("peft.LoraConfig")] = None
    baseline: bool = pydantic.Field(
        True, description="Also train the same student with cross-entropy alone on the same tokens, as a comparison."
    )
    optimizer: AnyOptimizer = Optimizer()
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] = "sdpa"
    evaluation_rows: int = pydantic.Field(50, ge=1, description="Rows of a task for which texts are generated.")
    generation: Annotated[dict[str, Any], Section("transformers.GenerationConfig")] = {}
    trust_remote_code: bool = pydantic.Field(False, description="Run the code that comes with a model.")
    bad_steps: BadSteps = pydantic.Field(BadSteps(), description="What to do about steps whose numbers are bad.")
    accept: Accept = {}
    push: Push | None = None
    train: Annotated[dict[str, Any], TRAIN]

    def settings(self) -> Distillation:
        """Return what student and teacher are told."""
        names = {field.name for field in dataclasses.fields(Distillation)} - {"task"}
        return Distillation(task=self.as_task(), **{name: getattr(self, name) for name in names})


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a model is loaded or a row is tokenized."""
    from hfkit.distillation import checks

    scores = scores_of_training(recipe.as_task().measured_by)
    yield from limits.check_best(recipe.train, scores)
    yield from checks.problems(recipe.settings(), inputs)
    of_both = [*scores, *limits.COSTS]
    of_student = [*of_both, "retention", *(["gap_closed"] if recipe.baseline else [])]
    yield from limits.problems(recipe.accept, of_student, of_both, "the teacher")


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from transformers import set_seed
    from transformers.utils import logging

    from hfkit.data.chat import set_generation_ids
    from hfkit.distillation import checks, report
    from hfkit.distillation.data import training_data
    from hfkit.distillation.student import make_student
    from hfkit.distillation.teacher import load_teacher
    from hfkit.distillation.trainer import settled_trainer
    from hfkit.training.fit import fit, newest_checkpoint
    from hfkit.training.saving import save
    from hfkit.training.task_metrics import TaskMetrics
    from hfkit.training.trainer import training_arguments

    settings, task = recipe.settings(), recipe.as_task()

    # Data
    logging.disable_progress_bar()  # of writing a few files
    checkpoint = newest_checkpoint(output)
    tokenizer = load_tokenizer(checks.tokenizer_path(inputs), chat_template=recipe.chat_template)
    width = checks.shared_width(settings, inputs)
    args = training_arguments(recipe.train, output)
    data_path, teacher_path = inputs["data"].path, inputs["teacher"].path
    teacher = functools.cache(lambda: load_teacher(settings, teacher_path, args.device))
    data = training_data(settings, data_path, teacher_path, tokenizer, teacher, width, beside(output))
    say(data.shown)

    # Student
    def student() -> "PreTrainedModel":
        set_seed(args.seed)
        model = make_student(settings, inputs, tokenizer, teacher)
        set_generation_ids(model, tokenizer, task.is_chat)
        return model

    # Training
    batch_size, length = args.per_device_train_batch_size, recipe.sequence_length
    arguments = (batch_size, recipe.generation, length, recipe.evaluation_rows)
    task_metrics = TaskMetrics(task, data_path, tokenizer, *arguments)
    model = student()
    checks.warn_of_small_teacher(teacher_path, model, recipe.trust_remote_code)
    trainer = settled_trainer(settings, model, data, task_metrics, output, teacher, width)
    metrics = fit(trainer, output, checkpoint, data.tokens_a_row, length)
    scores = {"student": report.scores(trainer, data, task_metrics)}
    metrics["size_bytes"] = save(trainer, tokenizer, output)

    # Its teacher, and the same student without one
    scores["teacher"] = report.teacher_scores(
        trainer, teacher, data, task_metrics, recipe.packing, teacher_path, output
    )
    if recipe.baseline:
        say("\n  The same student with cross-entropy alone, on the same tokens")
        scores["alone"] = _alone(settings, student(), data, task_metrics, output)
    metrics |= report.compared(scores) | data.facts
    on_main("close", lambda: report.close(output, scores["teacher"]))
    say(report.summary(metrics, scores, output))
    if recipe.accept:
        from hfkit.evaluation.measuring import judge
        from hfkit.evaluation.settings import Scoring

        scoring = Scoring(task, trust_remote_code=recipe.trust_remote_code)
        asked_of = (recipe.accept, metrics, scores["teacher"], scoring, data_path, output, teacher_path)
        metrics["accept"] = on_main("accept", lambda: judge(*asked_of))
    return metrics


def _alone(
    settings: Distillation, model: "PreTrainedModel", data: "TrainingData", task_metrics: "TaskMetrics", output: Path
) -> dict[str, float]:
    """Return the scores of the student trained without its teacher, in a folder of its own, resumed as any run."""
    from hfkit.artifacts import manifest
    from hfkit.distillation import report
    from hfkit.distillation.trainer import settled_trainer
    from hfkit.training.fit import fit, newest_checkpoint

    folder = output / report.ALONE

    def prepare() -> None:
        folder.mkdir(exist_ok=True)
        started = manifest.read_json(output, manifest.STARTED) or {}
        if (manifest.read_json(folder, manifest.STARTED) or {}).get("fingerprint") != started.get("fingerprint"):
            started = {key: value for key, value in started.items() if key != "committed"}
            manifest.write_json(folder / manifest.STARTED, started)

    on_main("resume alone", prepare)
    checkpoint = newest_checkpoint(folder)
    trainer = settled_trainer(settings, model, data, task_metrics, folder)
    fit(trainer, folder, checkpoint, data.tokens_a_row, settings.sequence_length)
    return report.scores(trainer, data, task_metrics)
