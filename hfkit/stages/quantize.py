"""Quantize a model to 8 or 4 bit, and tell what that has cost and saved."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.compression.settings import check_calibration
from hfkit.errors import refuse
from hfkit.evaluation.settings import ScoredRecipe
from hfkit.recipe.fields import Input, Push, Section, StageRecipe
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


def check(recipe: Recipe, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Iterator[tuple[str, str]]:
    """What can be known before a weight is loaded."""
    from hfkit.compression import quantization
    from hfkit.evaluation import checks

    yield from quantization.problems(recipe.method, recipe.quantization)
    yield from check_calibration(recipe, places, recipe.method == "gptq", recipe.method)
    yield from checks.of_smaller(recipe, places, recipes, quantization.problems_with)


def run(recipe: Recipe, places: dict[str, str], output: Path) -> dict[str, Any]:
    from transformers.utils import logging

    from hfkit.compression import calibration, quantization
    from hfkit.compression.whole import whole
    from hfkit.data import corpus
    from hfkit.data.tokenizer import load_tokenizer
    from hfkit.evaluation import checks, comparison
    from hfkit.reports import comparison as report

    # Everything that can be wrong with what is there now, before a weight is loaded
    logging.disable_progress_bar()
    rows = corpus.read_split(places["data"], recipe.split, recipe.limit)
    refuse(quantization.problems_with(recipe, places["model"]))
    checks.refuse(recipe, rows, {"model": places["model"]})
    found = calibration.texts_of(recipe, places, rows) if recipe.calibration is not None else []
    texts = list(islice(found, recipe.calibration_rows))

    # The model
    with whole(places["model"], recipe, output) as (place, drift):
        use: Any = "classify" if recipe.task == "classify" else "generate"
        tokenizer = load_tokenizer(place, use, recipe.chat_template)
        facts = quantization.quantize(place, output, recipe, texts, tokenizer)
    modules, left = len(facts["quantized_modules"]), facts["whole_modules"]
    say(f"  {modules} matrices quantized; whole: {', '.join(left) or 'none'}")
    sizes = [f"{facts[name] / 1e6:,.2f}" for name in ("weight_bytes", "promised_bytes")]
    say("  {} MB of weights, {} by the format".format(*sizes))

    # Beside the model that it was
    result = comparison.compared(recipe, rows, {"before": places["model"], "quantized": str(output)})
    say(report.screen(result))
    return comparison.beside_base(result, recipe.accept) | facts | drift
