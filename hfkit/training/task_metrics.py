"""How well a model does its task: texts generated for rows of a split, scored."""

import itertools
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.data import corpus
from hfkit.data.tasks import check_answers, reference
from hfkit.errors import HfkitError
from hfkit.inference.generation import answers, generation_of, prompts_of
from hfkit.metrics import scoring
from hfkit.metrics.catalogue import CATALOGUE, of_answers
from hfkit.runtime.distributed import on_main


class TaskMetrics:
    """ROUGE, BLEU and the share of exact matches of what a model generates.

    Args:
        recipe: with the task; its `generation:` holds arguments of `GenerationConfig`.
        data: the prepared data.
    """

    def __init__(self, recipe: Any, data: str, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.recipe, self.data, self.tokenizer, self.batch_size = recipe, data, tokenizer, batch_size

    def __call__(self, model: Any, split: str, count: int) -> dict[str, float]:
        """Of the first `count` rows of a split; of the test split with intervals. Call it on every process."""
        rows = list(itertools.islice(corpus.rows(self.data, split), count))
        predictions = answers(self.recipe, rows, model, self.tokenizer, self.batch_size, self.recipe.sequence_length)
        references = [reference(self.recipe, row) for row in rows]
        return on_main("task metrics", lambda: score(predictions, references, intervals=split == "test"))


def refuse_rows(recipe: Any, data: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an HfkitError for rows that nothing can be written for, or that no text can be scored on: hours into a
    training is too late."""
    for split in ("validation", "test") if recipe.task != "classify" else ():
        rows = list(itertools.islice(corpus.rows(data, split), recipe.evaluation_rows))
        for key, problem in check_answers(recipe, rows, split):
            raise HfkitError(f"{key}: {problem}")
        generation = generation_of(recipe, tokenizer, recipe.sequence_length)
        prompts_of(recipe, rows, tokenizer, recipe.sequence_length, generation, False)


def score(predictions: list[str], references: list[list[str]], intervals: bool = False) -> dict[str, float]:
    """ROUGE (0 to 1), BLEU (0 to 100) and exact match (0 to 1); with `_low` and `_high` their 95 % intervals."""
    kept = of_answers()
    metrics = [each.name for each in CATALOGUE if each.in_training]
    found = scoring.statistics(metrics, predictions, references)
    known = scoring.scores(found) if intervals else {}
    for name, each in found.items():
        known |= {name if key == "score" else key: float(value) for key, value in each.scores().items()}
    return {name: value for name, value in known.items() if name.removesuffix("_low").removesuffix("_high") in kept}
