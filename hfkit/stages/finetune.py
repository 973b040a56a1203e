"""Fine-tune a model for a task: all of its weights, or an adapter on it (LoRA), quantized or not."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts.cache import beside
from hfkit.artifacts.manifest import Metrics
from hfkit.data import corpus
from hfkit.data.chat import set_generation_ids
from hfkit.data.tasks import about_tasks
from hfkit.data.tasks.checks import check_data, is_multi_label
from hfkit.data.tasks.keys import FinetunedTask, TaskRecipe
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.metrics.catalogue import scores_of_training
from hfkit.recipe import limits
from hfkit.recipe.fields import Input, Push, ResolvedInputs, Section
from hfkit.recipe.limits import Accept
from hfkit.runtime.distributed import on_main, say
from hfkit.training.settings import TRAIN, AnyOptimizer, BadSteps, Optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Recipe(TaskRecipe):
    """A model trained for a task on the completions only. With `lora:` an adapter is trained, with `quantization:` on
    a quantized base (QLoRA); without, all weights."""

    MAKES: ClassVar[str] = "model"
    DISTRIBUTED: ClassVar[bool] = True
    SUMMARY: ClassVar[str] = "A language model, fine-tuned for a task{adapter}."

    stage: Literal["finetune"]
    model: Annotated[str, Input("model")]
    data: Annotated[str, Input("data set")]
    task: FinetunedTask = pydantic.Field(description=about_tasks("finetune"))
    sequence_length: int = pydantic.Field(512, ge=8, description="Most tokens of an example, and tokens of a row.")
    packing: bool = pydantic.Field(
        True, description="Fill each row with several examples, none of which attends to another. Not for classes."
    )
    lora: Annotated[dict[str, Any] | None, Section("peft.LoraConfig")] = None
    quantization: Annotated[
        dict[str, Any] | None, Section("transformers.BitsAndBytesConfig", (("quant_method", "it is bitsandbytes"),))
    ] = None
    merge: bool = pydantic.Field(False, description="Also write merged/: the base with the adapter's weights added.")
    optimizer: AnyOptimizer = Optimizer()
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] = "sdpa"
    evaluation_rows: int = pydantic.Field(
        50, ge=1, description="Rows of validation for which texts are generated at each evaluation during training."
    )
    generation: Annotated[dict[str, Any], Section("transformers.GenerationConfig")] = {}
    trust_remote_code: bool = pydantic.Field(False, description="Run the code that comes with the model.")
    bad_steps: BadSteps = pydantic.Field(BadSteps(), description="What to do about steps whose numbers are bad.")
    accept: Accept = {}
    push: Push | None = None
    train: Annotated[dict[str, Any], TRAIN]

    @property
    def tokenizer_use(self) -> Literal["train", "classify"]:
        return "classify" if self.as_task().has_classes else "train"

    @pydantic.model_validator(mode="after")
    def _keys_that_fit(self) -> "Recipe":
        if self.lora is None and self.quantization is not None:
            raise ValueError(
                "quantization=...: quantized weights cannot be trained; add `lora: {}` to train an adapter"
            )
        if self.lora is None and self.merge:
            raise ValueError("merge=true: without `lora:` there is no adapter to merge; delete one of them")
        if self.as_task().has_classes and self.optimizer.name == "muon":
            raise ValueError("optimizer=muon: classes are learned with adamw; delete the key")
        return self


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a weight is loaded or a row is tokenized."""
    from hfkit.model.adapters import refuse_adapter

    task, data, base = recipe.as_task(), inputs["data"], inputs["model"]
    problems = list(check_data(task, data))
    yield from problems
    of_training = scores_of_training(task.measured_by, is_multi_label(task, data))
    yield from limits.check_best(recipe.train, of_training)
    of_base = limits.COSTS if task.has_classes else (*of_training, *limits.COSTS)  # it has no classes yet
    yield from limits.problems(recipe.accept, [*of_training, *limits.COSTS], of_base, "the model before")
    if problem := refuse_adapter(inputs["model"].path):
        yield "model", problem
        return
    tokenizer, longest = None, getattr(inputs["model"].recipe, "sequence_length", None)
    if base.exists:
        from hfkit.model.loading import load_config
        from hfkit.model.vocabulary import ids_of

        try:
            tokenizer = load_tokenizer(inputs["model"].path, recipe.tokenizer_use, recipe.chat_template)
            config = load_config(inputs["model"].path, recipe.trust_remote_code)
            ids_of(tokenizer, config.get_text_config().vocab_size, inputs["model"].path)
        except HfkitError as error:
            yield "model", str(error)
            return
        if recipe.lora is None and getattr(config, "quantization_config", None) is not None:
            rule = "quantized weights cannot be trained; add `lora: {}` to train an adapter"
            yield "model", f"{base.path}: {rule}, or name the model that it was made from"
        longest = getattr(config, "max_position_embeddings", None)  # models with relative positions have none
    if longest is not None and recipe.sequence_length > longest:
        yield "sequence_length", f"must be at most the model's {longest} positions, got {recipe.sequence_length}"
    if not problems:
        yield from task.room_problems(tokenizer, recipe.sequence_length, recipe.generation.get("max_new_tokens"))
        if tokenizer is not None and data.exists:
            yield from task.row_problems(corpus.rows(data.path, "train"), tokenizer, "the train split")


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from transformers import set_seed
    from transformers.utils import logging

    from hfkit.data.rows.examples import Examples, counted, show_example, task_examples
    from hfkit.reports.training import task_summary
    from hfkit.training import saving
    from hfkit.training.fit import fit, newest_checkpoint
    from hfkit.training.task_metrics import TaskMetrics
    from hfkit.training.trainer import training_arguments

    task, data_path, base_path = recipe.as_task(), inputs["data"].path, inputs["model"].path

    # Data
    logging.disable_progress_bar()  # of writing a few files
    checkpoint = newest_checkpoint(output)
    tokenizer = load_tokenizer(base_path, recipe.tokenizer_use, recipe.chat_template)
    args = training_arguments(recipe.train, output)
    length, cache = recipe.sequence_length, beside(output)
    arguments = (args.per_device_train_batch_size, recipe.generation, length, recipe.evaluation_rows)
    task_metrics = TaskMetrics(task, data_path, tokenizer, *arguments)
    on_main("answers", task_metrics.refuse_rows)
    folder = on_main("examples", lambda: str(task_examples(data_path, task, tokenizer, length, cache)))
    splits = {split: Examples(Path(folder), split) for split in corpus.SPLITS}
    counts = splits["train"].counts
    say(counted(counts, length))
    say(show_example(splits["train"][0], tokenizer))

    # Model
    set_seed(args.seed)
    model = _load(recipe, base_path, splits["train"], tokenizer)

    # Training
    trainer, test_rows = _trainer(recipe, model, tokenizer, splits, task_metrics, output)
    base = _base_scores(recipe, trainer, test_rows, task_metrics)
    trained = fit(trainer, output, checkpoint, splits["train"].tokens / len(trainer.train_dataset), length)

    # Result
    if splits["train"].is_multi_label:
        trainer.choose_thresholds()
    metrics: dict[str, Any] = saving.evaluate(trainer, trainer.eval_dataset, test_rows) | trained
    metrics |= task_metrics(model, "test") if task.has_answers else {}
    metrics |= {name: counts[name] for name in ("examples", "cut", "dropped")}
    metrics["size_bytes"] = saving.save(trainer, tokenizer, output)
    if recipe.merge:
        ids = splits["train"][0]["input_ids"][None]
        metrics["merge_drift"] = on_main("merge", lambda: _merge(recipe, tokenizer, output, ids))
    say(task_summary(metrics, output))
    if recipe.accept:
        from hfkit.evaluation.measuring import judge
        from hfkit.evaluation.settings import Scoring

        scoring = Scoring(task, trust_remote_code=recipe.trust_remote_code)
        asked_of = (recipe.accept, metrics, base, scoring, data_path, output, base_path)
        metrics["accept"] = on_main("accept", lambda: judge(*asked_of))
    return metrics


def _base_scores(recipe: Recipe, trainer: Any, test_rows: Any, task_metrics: Any) -> dict[str, float]:
    """Return what the model is worth before the training, where a limit is a factor of that."""
    from hfkit.training.progress import own_random_numbers

    factors = {name for name, text in recipe.accept.items() if limits.limit_of(text).is_factor}
    if not factors - set(limits.COSTS):
        return {}
    with own_random_numbers(trainer.args.device):
        metrics = trainer.token_metrics(test_rows, "evaluating the model before")
        return metrics | task_metrics(trainer.model, "test")


def _load(recipe: Recipe, path: str, examples: Any, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the model to train: in float32, with an adapter or a head of classes where the recipe asks for one."""
    import torch

    from hfkit.model import adapters
    from hfkit.model.loading import load_model

    has_classes = recipe.as_task().has_classes
    model: Any = load_model(
        path,
        has_classes,
        labels=examples.labels,
        is_multi_label=examples.is_multi_label,
        dtype=torch.float32,
        quantization=recipe.quantization,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    )
    if has_classes:
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        set_generation_ids(model, tokenizer, recipe.as_task().is_chat)
    if recipe.lora is None:
        return model
    return adapters.adapt(model, recipe.lora, has_classes, recipe.quantization is not None)


def _trainer(
    recipe: Recipe,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    splits: dict[str, Any],
    task_metrics: Any,
    output: Path,
) -> tuple[Any, Any]:
    """Return the trainer of the task, and the rows of the test split."""
    from transformers import default_data_collator

    from hfkit.data.rows.examples import PackedExamples, pad
    from hfkit.training.classification import ClassificationTrainer
    from hfkit.training.decisions import settle
    from hfkit.training.trainer import HfkitTrainer

    collate: Any = default_data_collator
    has_classes = recipe.as_task().has_classes
    if recipe.packing and not has_classes:
        rows: Any = {
            name: PackedExamples(split, recipe.sequence_length, tokenizer.pad_token_id)
            for name, split in splits.items()
        }
    else:
        rows, collate = splits, partial(pad, pad_token_id=tokenizer.pad_token_id)
    optimizer = recipe.optimizer.name
    args, decided = settle(
        recipe.train, output, model, rows["train"], lambda count: f"{count} rows, {optimizer}", collate, optimizer
    )
    data = {"data_collator": collate, "train_dataset": rows["train"], "eval_dataset": rows["validation"]}
    trainer: Any
    if has_classes:
        trainer = ClassificationTrainer(model, args, recipe.bad_steps, decided, **data)
    else:
        sample = partial(task_metrics, model, "validation")
        own: dict[str, Any] = {"optimizer": recipe.optimizer, "task_metrics": sample}
        trainer = HfkitTrainer(model, args, recipe.bad_steps, decided, **own, **data)
    return trainer, rows["test"]


def _merge(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", output: Path, ids: Any) -> float:
    """Write merged/, and say how far its logits are from the adapter's."""
    from hfkit.model import adapters

    drift = adapters.merge(output, output / "merged", recipe.as_task().has_classes, recipe.quantization, ids)
    tokenizer.save_pretrained(output / "merged")
    say(f"  merged/: its logits are off by {drift:.2g} of what the adapter changes in the base's")
    return drift
