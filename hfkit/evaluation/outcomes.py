"""What a model makes of the rows that it is scored on, and what that is worth."""

from typing import Any, NamedTuple

import numpy as np

from hfkit.data.tasks import classes_of, reference
from hfkit.evaluation.inputs import Inputs
from hfkit.inference import likelihood
from hfkit.inference.generation import write
from hfkit.metrics import scoring
from hfkit.metrics.base import Statistics


class Outcome(NamedTuple):
    """What a model made of the rows: of each its prompt and its answer, a text, a class or a list of classes, and
    the (rows, 3) nats, tokens and bytes of what it was to say; none where that was not asked for."""

    inputs: Inputs
    prompts: list[str]
    texts: list[Any]
    sums: np.ndarray


def outcome_of(recipe: Any, model: Any, inputs: Inputs) -> Outcome:
    """What a model makes of the rows. Call it on every process."""
    tokenizer, batch_size = inputs.tokenizer, recipe.batch_size
    texts, sums = list[Any](), np.zeros((0, 3))
    if recipe.task == "classify":
        texts = likelihood.classes(model, inputs.prompts, batch_size, tokenizer.pad_token_id)
    elif inputs.prompts:
        texts = write(model, tokenizer, inputs.prompts, batch_size, inputs.generation)
    if inputs.pieces is not None:
        sums = inputs.pieces.sums(model, batch_size, tokenizer)
    shown = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in inputs.prompts]
    return Outcome(inputs, shown, texts, sums)


def references_of(recipe: Any, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Of each row what a right answer is; of a classifier's row its class, or all of its classes."""
    return [classes_of(recipe, row) if recipe.task == "classify" else reference(recipe, row) for row in rows]


def statistics_of(recipe: Any, rows: list[dict[str, Any]], outcomes: list[Outcome]) -> list[dict[str, Statistics]]:
    """Of each model the statistics of each metric, on the same rows."""
    found: list[dict[str, Statistics]] = [{} for _ in outcomes]
    if outcomes[0].texts:
        references = references_of(recipe, rows)
        answers = [each.texts for each in outcomes]
        if any(isinstance(each[0], list) for each in answers):  # one that chooses one class is held to lists too
            answers = [list(map(scoring.listed, each)) for each in answers]
        labels = scoring.classes_in(references, *answers)
        found = [scoring.statistics(recipe.chosen, each, references, labels, recipe.tokenize) for each in answers]
    if outcomes[0].inputs.pieces is not None:
        likelihoods = scoring.of_likelihood(recipe.chosen, [each.sums for each in outcomes])
        found = [of_texts | more for of_texts, more in zip(found, likelihoods, strict=True)]
    return found


def same_tokens(outcomes: list[Outcome]) -> bool:
    """Whether the models have one vocabulary, so that what is taken per token compares."""
    return all(each.inputs.tokenizer.get_vocab() == outcomes[0].inputs.tokenizer.get_vocab() for each in outcomes[1:])
