"""What a model makes of the rows that it is scored on, and what that is worth."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfkit.data.corpus import Row
from hfkit.evaluation.inputs import Inputs
from hfkit.evaluation.settings import Scoring
from hfkit.inference import likelihood
from hfkit.inference.generation import write
from hfkit.metrics.base import Statistics
from hfkit.metrics.scoring import classes_in, listed, of_likelihood, statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Outcome(NamedTuple):
    """What a model made of the rows: of each its prompt and its answer, a text, a class or a list of classes, and
    the (rows, 3) nats, tokens and bytes of what it was to say; none where that was not asked for."""

    inputs: Inputs
    prompts: list[str]
    texts: list[Any]
    sums: np.ndarray


def outcome_of(scoring: Scoring, model: "PreTrainedModel", inputs: Inputs) -> Outcome:
    """Return what a model makes of the rows. Call it on every process."""
    tokenizer, batch_size = inputs.tokenizer, scoring.batch_size
    texts, sums = list[Any](), np.zeros((0, 3))
    if scoring.task.has_classes:
        texts = likelihood.classes(model, inputs.prompts, batch_size, tokenizer.pad_token_id)
    elif inputs.prompts:
        texts = write(model, tokenizer, inputs.prompts, batch_size, inputs.generation)
    if inputs.pieces is not None:
        sums = inputs.pieces.sums(model, batch_size, tokenizer)
    shown = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in inputs.prompts]
    return Outcome(inputs, shown, texts, sums)


def statistics_of(scoring: Scoring, rows: list[Row], outcomes: list[Outcome]) -> list[dict[str, Statistics]]:
    """Return the statistics of each metric of each model, on the same rows."""
    results: list[dict[str, Statistics]] = [{} for _ in outcomes]
    if outcomes[0].texts:
        references = list(map(scoring.task.references, rows))
        answers = [outcome.texts for outcome in outcomes]
        if any(isinstance(texts[0], list) for texts in answers):  # one that chooses one class is held to lists too
            answers = [list(map(listed, texts)) for texts in answers]
        labels = classes_in(references, *answers)
        results = [statistics(scoring.metrics, texts, references, labels, scoring.tokenize) for texts in answers]
    if outcomes[0].inputs.pieces is not None:
        likelihoods = of_likelihood(scoring.metrics, [outcome.sums for outcome in outcomes])
        results = [of_texts | likelihood for of_texts, likelihood in zip(results, likelihoods, strict=True)]
    return results


def same_tokens(outcomes: list[Outcome]) -> bool:
    """Return whether the models have one vocabulary, so that what is taken per token compares."""
    return all(
        other.inputs.tokenizer.get_vocab() == outcomes[0].inputs.tokenizer.get_vocab() for other in outcomes[1:]
    )
