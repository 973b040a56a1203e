"""Quantize a model to 8 or 4 bit, and tell what that has cost and saved."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts.manifest import Metrics
from hfkit.compression.settings import check_calibration
from hfkit.errors import refuse
from hfkit.evaluation.settings import ScoredRecipe
from hfkit.recipe.fields import Input, Push, ResolvedInputs, Section
from hfkit.recipe.limits import Accept
from hfkit.runtime.distributed import say

_BY_HFKIT = "it is made of `calibration`"


class Recipe(ScoredRecipe):
    """A model whose weights have few bits. An adapter is merged into its base first. The head stays whole."""

    MAKES: ClassVar[str] = "model"
    DISTRIBUTED: ClassVar[bool] = False
    SUMMARY: ClassVar[str] = "A language model whose weights were quantized."

    stage: Literal["quantize"]
    model: Annotated[str, Input("model")]
    data: Annotated[str, Input("data set")] = pydantic.Field(description="What both models are scored on.")
    method: Literal["bitsandbytes", "gptq", "awq", "hqq", "torchao"] = "bitsandbytes"
    quantization: Annotated[
        dict[str, Any],
        Section(
            "transformers.BitsAndBytesConfig",
            (("quant_method", "it is `method`"), ("tokenizer", "it is the model's"), ("dataset", _BY_HFKIT)),
            chosen_by="method",
            variants=(
                ("gptq", "transformers.GPTQConfig"),
                ("torchao", "hfkit.compression.settings.TorchAo"),
                ("awq", ""),
                ("hqq", ""),
            ),
        ),
    ]
    calibration: Annotated[str | None, Input("data set")] = pydantic.Field(
        None, description="The text that gptq fits the weights to, never that of the evaluation."
    )
    calibration_split: Literal["train", "validation", "test"] = "train"
    calibration_rows: int = pydantic.Field(128, ge=1, description="Documents of that text.")
    accept: Accept = {}
    push: Push | None = None


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a weight is loaded."""
    from hfkit.compression import quantization
    from hfkit.evaluation import checks

    scoring, method, options = recipe.scoring(), recipe.method, recipe.quantization
    yield from quantization.problems(method, options)
    yield from check_calibration(
        scoring.task, inputs, recipe.calibration_split, recipe.split, method == "gptq", method
    )
    yield from checks.of_smaller(scoring, inputs, recipe.accept, lambda path: _problems_with(path, recipe))


def _problems_with(path: str, recipe: Recipe) -> Iterator[tuple[str, str]]:
    from hfkit.compression.quantization import problems_with

    has_classes = recipe.as_task().has_classes
    return problems_with(path, recipe.method, recipe.quantization, has_classes, recipe.trust_remote_code)


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from transformers.utils import logging

    from hfkit.compression import calibration, quantization
    from hfkit.compression.whole import whole
    from hfkit.data import corpus
    from hfkit.data.tokenizer import load_tokenizer
    from hfkit.evaluation import checks, comparison
    from hfkit.reports import comparison as report

    # Everything that can be wrong with what is there now, before a weight is loaded
    logging.disable_progress_bar()
    scoring, before = recipe.scoring(), inputs["model"].path
    task, rows = scoring.task, corpus.read_split(inputs["data"].path, recipe.split, recipe.limit)
    refuse(_problems_with(before, recipe))
    checks.refuse(scoring, rows, {"model": before})
    texts: list[str] = []
    if "calibration" in inputs:
        samples = calibration.texts_of(task, inputs["calibration"].path, recipe.calibration_split, rows)
        texts = list(islice(samples, recipe.calibration_rows))

    # The model
    with whole(before, task, output) as (path, drift):
        tokenizer = load_tokenizer(path, task.tokenizer_use, task.chat_template)
        how = (recipe.method, recipe.quantization)
        facts = quantization.quantize(path, output, *how, task, texts, tokenizer, recipe.trust_remote_code)
    modules, left = len(facts["quantized_modules"]), facts["whole_modules"]
    say(f"  {modules} matrices quantized; whole: {', '.join(left) or 'none'}")
    sizes = [f"{facts[name] / 1e6:,.2f}" for name in ("weight_bytes", "promised_bytes")]
    say("  {} MB of weights, {} by the format".format(*sizes))

    # Beside the model that it was
    result = comparison.compared(scoring, rows, {"before": before, "quantized": str(output)})
    say(report.screen(result))
    return comparison.beside_base(result, recipe.accept) | facts | drift
