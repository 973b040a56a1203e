"""Fine-tune a model for a task: all of its weights, or an adapter on it (LoRA), quantized or not."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.data import corpus
from hfkit.data.chat import set_generation_ids
from hfkit.data.tasks import (
    TaskRecipe,
    check_chats,
    check_data,
    check_room,
    is_multi_label,
)
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.metrics.catalogue import scores_of_training
from hfkit.recipe import limits
from hfkit.recipe.fields import Input, Push, Section, StageRecipe, is_there
from hfkit.recipe.limits import Accept
from hfkit.runtime.distributed import on_main, say
from hfkit.training.settings import TRAIN, AnyOptimizer, BadSteps, Optimizer


class Recipe(TaskRecipe):
    """A model trained for a task on the completions only. With `lora:` an adapter is trained, with `quantization:` on
    a quantized base (QLoRA); without, all weights."""

    MAKES: ClassVar[str] = "model"
    DISTRIBUTED: ClassVar[bool] = True
    SUMMARY: ClassVar[str] = "A language model, fine-tuned for a task{adapter}."

    stage: Literal["finetune"]
    model: Annotated[str, Input("model")]
    data: Annotated[str, Input("data set")]
    task: Literal["generate", "chat", "classify"] = pydantic.Field(
        description="generate: a completion after a prompt. chat: the assistant's turns. classify: a label for a text."
    )
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
        return "classify" if self.task == "classify" else "train"

    @pydantic.model_validator(mode="after")
    def _keys_that_fit(self) -> "Recipe":
        if self.lora is None and self.quantization is not None:
            raise ValueError(
                "quantization=...: quantized weights cannot be trained; add `lora: {}` to train an adapter"
            )
        if self.lora is None and self.merge:
            raise ValueError("merge=true: without `lora:` there is no adapter to merge; delete one of them")
        if self.task == "classify" and self.optimizer.name == "muon":
            raise ValueError("optimizer=muon: classes are learned with adamw; delete the key")
        return self


def check(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Iterator[tuple[str, str]]:
    """What can be known before a weight is loaded or a row is tokenized."""
    from hfkit.model.adapters import refuse_adapter

    problems = list(check_data(recipe, places["data"], recipes.get("data")))
    yield from problems
    of_training = scores_of_training(recipe.task, is_multi_label(recipe, places["data"], recipes.get("data")))
    yield from limits.check_best(recipe.train, of_training)
    of_base = limits.COSTS if recipe.task == "classify" else (*of_training, *limits.COSTS)  # it has no classes yet
    yield from limits.problems(recipe.accept, [*of_training, *limits.COSTS], of_base, "the model before")
    if problem := refuse_adapter(places["model"]):
        yield "model", problem
        return
    tokenizer, longest = None, getattr(recipes.get("model"), "sequence_length", None)
    if is_there(places["model"], recipes.get("model")):
        from hfkit.model.loading import load_config
        from hfkit.model.vocabulary import ids_of

        try:
            tokenizer = load_tokenizer(places["model"], recipe.tokenizer_use, recipe.chat_template)
            config = load_config(places["model"], recipe.trust_remote_code)
            ids_of(tokenizer, config.get_text_config().vocab_size, places["model"])
        except HfkitError as error:
            yield "model", str(error)
            return
        if recipe.lora is None and getattr(config, "quantization_config", None) is not None:
            rule = "quantized weights cannot be trained; add `lora: {}` to train an adapter"
            yield "model", f"{places['model']}: {rule}, or name the model that it was made from"
        longest = getattr(config, "max_position_embeddings", None)  # models with relative positions have none
    if longest is not None and recipe.sequence_length > longest:
        yield "sequence_length", f"must be at most the model's {longest} positions, got {recipe.sequence_length}"
    if not problems:
        yield from check_room(recipe, tokenizer, recipe.sequence_length, recipe.generation.get("max_new_tokens"))
        if recipe.task == "chat" and tokenizer is not None and is_there(places["data"], recipes.get("data")):
            yield from check_chats(recipe, corpus.rows(places["data"], "train"), tokenizer, "the train split")


def run(recipe: Recipe, places: dict[str, str], output: Path) -> dict[str, Any]:
    from transformers import set_seed
    from transformers.utils import logging

    from hfkit.data.rows.examples import Examples, counted, show_example, task_examples
    from hfkit.reports.training import task_summary
    from hfkit.training import saving
    from hfkit.training.fit import fit, newest_checkpoint
    from hfkit.training.task_metrics import TaskMetrics, refuse_rows
    from hfkit.training.trainer import training_arguments

    # Data
    logging.disable_progress_bar()  # of writing a few files
    checkpoint = newest_checkpoint(output)
    tokenizer = load_tokenizer(places["model"], recipe.tokenizer_use, recipe.chat_template)
    length, cache = recipe.sequence_length, output.parent / ".cache"
    on_main("answers", lambda: refuse_rows(recipe, places["data"], tokenizer))
    folder = on_main("examples", lambda: str(task_examples(places["data"], recipe, tokenizer, length, cache)))
    splits = {split: Examples(Path(folder), split) for split in corpus.SPLITS}
    counts = splits["train"].counts
    say(counted(counts, length))
    say(show_example(splits["train"][0], tokenizer))

    # Model
    args = training_arguments(recipe.train, output)
    set_seed(args.seed)
    model = _load(recipe, places["model"], splits["train"], tokenizer)

    # Training
    task_metrics = TaskMetrics(recipe, places["data"], tokenizer, args.per_device_train_batch_size)
    trainer, test_rows = _trainer(recipe, model, tokenizer, splits, task_metrics, output)
    base = _base_scores(recipe, trainer, test_rows, task_metrics)
    trained = fit(trainer, output, checkpoint, splits["train"].tokens / len(trainer.train_dataset), length)

    # Result
    if splits["train"].is_multi_label:
        trainer.choose_thresholds()
    metrics: dict[str, Any] = saving.evaluate(trainer, trainer.eval_dataset, test_rows) | trained
    metrics |= task_metrics(model, "test", recipe.evaluation_rows) if recipe.task != "classify" else {}
    metrics |= {name: counts[name] for name in ("examples", "cut", "dropped")}
    metrics["size_bytes"] = saving.save(trainer, tokenizer, output)
    if recipe.merge:
        ids = splits["train"][0]["input_ids"][None]
        metrics["merge_drift"] = on_main("merge", lambda: _merge(recipe, tokenizer, output, ids))
    say(task_summary(metrics, output))
    if recipe.accept:
        from hfkit.evaluation.measuring import judge

        metrics["accept"] = on_main("accept", lambda: judge(recipe, metrics, base, places, output))
    return metrics


def _base_scores(recipe: Recipe, trainer: Any, test_rows: Any, task_metrics: Any) -> dict[str, float]:
    """What the model is worth before the training, where a limit is a factor of that."""
    from hfkit.training.progress import own_random_numbers

    factors = {name for name, text in recipe.accept.items() if limits.limit_of(text).is_factor}
    if not factors - set(limits.COSTS):
        return {}
    with own_random_numbers(trainer.args.device):
        found = trainer.token_metrics(test_rows, "evaluating the model before")
        return found | task_metrics(trainer.model, "test", recipe.evaluation_rows)


def _load(recipe: Recipe, place: str, examples: Any, tokenizer: Any) -> Any:
    """The model to train: in float32, with an adapter or a head of classes where the recipe asks for one."""
    import torch

    from hfkit.model import adapters
    from hfkit.model.loading import load_model

    model: Any = load_model(
        place,
        recipe.task,
        labels=examples.labels,
        is_multi_label=examples.is_multi_label,
        dtype=torch.float32,
        quantization=recipe.quantization,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    )
    if recipe.task == "classify":
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        set_generation_ids(model, tokenizer, recipe.task == "chat")
    if recipe.lora is None:
        return model
    return adapters.adapt(model, recipe.lora, recipe.task, recipe.quantization is not None)


def _trainer(
    recipe: Recipe, model: Any, tokenizer: Any, splits: dict[str, Any], task_metrics: Any, output: Path
) -> tuple[Any, Any]:
    """The trainer of the task, and the rows of the test split."""
    from transformers import default_data_collator

    from hfkit.data.rows.examples import PackedExamples, pad
    from hfkit.training.classification import ClassificationTrainer
    from hfkit.training.decisions import settle
    from hfkit.training.trainer import HfkitTrainer

    collate: Any = default_data_collator
    if recipe.packing and recipe.task != "classify":
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
    if recipe.task == "classify":
        trainer = ClassificationTrainer(model, args, recipe.bad_steps, decided, **data)
    else:
        sample = partial(task_metrics, model, "validation", recipe.evaluation_rows)
        own: dict[str, Any] = {"optimizer": recipe.optimizer, "task_metrics": sample}
        trainer = HfkitTrainer(model, args, recipe.bad_steps, decided, **own, **data)
    return trainer, rows["test"]


def _merge(recipe: Recipe, tokenizer: Any, output: Path, ids: Any) -> float:
    """Write merged/, and say how far its logits are from the adapter's."""
    from hfkit.model import adapters

    drift = adapters.merge(output, output / "merged", recipe.task, recipe.quantization, ids)
    tokenizer.save_pretrained(output / "merged")
    say(f"  merged/: its logits are off by {drift:.2g} of what the adapter changes in the base's")
    return drift
