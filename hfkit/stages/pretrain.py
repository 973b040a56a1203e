"""Pretrain a decoder from scratch on prepared text."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts.cache import beside
from hfkit.artifacts.manifest import Metrics
from hfkit.data import corpus
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.metrics.catalogue import scores_of_training
from hfkit.recipe import limits
from hfkit.recipe.fields import Input, Push, ResolvedInput, ResolvedInputs, Section, StageRecipe
from hfkit.runtime.distributed import on_main, say
from hfkit.training.settings import TRAIN, AnyOptimizer, BadSteps, Optimizer

BYTES_PER_PARAMETER = 4 * (1 + 3 * 3)  # fp32: the result, and three checkpoints of weights and two moments
_FROM_TOKENIZER = "it is the tokenizer's"


class Recipe(StageRecipe):
    """A decoder trained from scratch. `train:` takes TrainingArguments; what it leaves out follows the defaults there,
    but for: bf16 and torch_compile where they are measured to pay, a log that shows NaN, two checkpoints kept."""

    MAKES: ClassVar[str] = "model"
    DISTRIBUTED: ClassVar[bool] = True
    SUMMARY: ClassVar[str] = "A language model, pretrained from scratch."

    stage: Literal["pretrain"]
    data: Annotated[str, Input("data set")]
    tokenizer: Annotated[str, Input("tokenizer")]
    model: Annotated[
        dict[str, Any],
        Section(
            "hfkit.model.configuration_hfkit.HfkitConfig",
            (("pad_token_id", _FROM_TOKENIZER), ("bos_token_id", _FROM_TOKENIZER), ("eos_token_id", _FROM_TOKENIZER)),
        ),
    ]
    sequence_length: int = pydantic.Field(512, ge=2, description="Tokens in a row of the batch.")
    packing: Literal["documents", "concatenate"] = pydantic.Field(
        "documents",
        description="documents: no token attends to another document. concatenate: documents run on in one another.",
    )
    optimizer: AnyOptimizer = pydantic.Field(Optimizer(), description="What updates the weights: adamw or muon.")
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] = "sdpa"
    prompts: list[str] | None = pydantic.Field(
        None, description="Texts to continue at the end. By default the beginnings of three test documents."
    )
    bad_steps: BadSteps = pydantic.Field(BadSteps(), description="What to do about steps whose numbers are bad.")
    push: Push | None = None
    train: Annotated[dict[str, Any], TRAIN]


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a weight is allocated or a row is tokenized."""
    yield from limits.check_best(recipe.train, scores_of_training(("likelihood",)))
    length, positions = recipe.sequence_length, recipe.model.get("max_position_embeddings")
    if positions is not None and length > positions:
        yield "sequence_length", f"must be at most model.max_position_embeddings={positions}, got {length}; change one"
    if problem := corpus.problem_with(inputs["data"].path):
        yield "data", problem
    vocab_size = getattr(inputs["tokenizer"].recipe, "vocab_size", None)
    if Path(inputs["tokenizer"].path).is_dir():
        try:
            vocab_size = len(load_tokenizer(inputs["tokenizer"].path))
        except HfkitError as error:
            yield "tokenizer", str(error)
            return
    rows = recipe.model.get("vocab_size")
    if rows is not None and vocab_size is not None and rows < vocab_size:
        rule = f"must be at least the tokenizer's {vocab_size}, got {rows}; raise it or leave it out"
        yield "model.vocab_size", rule
        return
    output = Path(recipe.output_dir or "runs").expanduser().absolute()
    free = shutil.disk_usage(next(folder for folder in (output, *output.parents) if folder.exists())).free
    needed = count_parameters(recipe, inputs["tokenizer"]) * BYTES_PER_PARAMETER
    if free < needed:
        yield "output_dir", f"{free / 1e6:.1f} MB are free, {needed / 1e6:.1f} are needed; make room or choose another"


def count_parameters(recipe: Recipe, tokenizer: ResolvedInput) -> int:
    """Return the number of parameters of the model that the recipe describes, from the shapes alone."""
    import torch

    from hfkit.model import HfkitConfig, HfkitForCausalLM

    vocab_size = getattr(tokenizer.recipe, "vocab_size", None) or len(load_tokenizer(tokenizer.path))
    with torch.device("meta"):
        return HfkitForCausalLM(HfkitConfig(**{"vocab_size": vocab_size, **recipe.model})).num_parameters()


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.utils import logging

    from hfkit.data.rows.packing import PackedRows, show_row, token_rows
    from hfkit.model.loading import new_config
    from hfkit.reports.training import summary
    from hfkit.training import saving
    from hfkit.training.decisions import settle
    from hfkit.training.fit import fit, newest_checkpoint
    from hfkit.training.samples import continuations, xz_bits_per_byte
    from hfkit.training.trainer import HfkitTrainer, training_arguments

    # Data
    logging.disable_progress_bar()  # of writing a few files
    checkpoint = newest_checkpoint(output)
    tokenizer = load_tokenizer(inputs["tokenizer"].path)
    length, cache = recipe.sequence_length, beside(output)
    folder = on_main("tokens", lambda: str(token_rows(inputs["data"].path, tokenizer, length, recipe.packing, cache)))
    train_rows, validation_rows, test_rows = (PackedRows(Path(folder), split) for split in corpus.SPLITS)
    say(show_row(train_rows[0], tokenizer))

    # Model
    args = training_arguments(recipe.train, output)
    set_seed(args.seed)
    config = new_config(recipe.model, tokenizer, length)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=recipe.attn_implementation)
    optimizer = recipe.optimizer.name
    args, decided = settle(
        recipe.train,
        output,
        model,
        train_rows,
        lambda rows: f"{rows * length:,} tokens, {optimizer}",
        optimizer=optimizer,
    )

    # Training
    trainer = HfkitTrainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        optimizer=recipe.optimizer,
        decided=decided,
        bad_steps=recipe.bad_steps,
    )
    trained = fit(trainer, output, checkpoint, length, length)

    # Result
    metrics: dict[str, Any] = saving.evaluate(trainer, validation_rows, test_rows) | trained
    metrics["xz_bits_per_byte"] = on_main("xz", lambda: xz_bits_per_byte(inputs["data"].path))
    metrics["parameters"] = model.num_parameters()
    metrics["size_bytes"] = saving.save(trainer, tokenizer, output)
    samples = on_main("samples", lambda: continuations(output, args.device, recipe.prompts, inputs["data"].path))
    say(summary(metrics, samples, output))
    return metrics | {"samples": [prompt + text for prompt, text in samples]}
