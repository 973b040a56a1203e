"""How well a model does its task: texts generated for rows of a split, scored."""

import itertools
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.data import corpus
from hfkit.data.tasks import reference
from hfkit.evaluation import scoring
from hfkit.evaluation.generation import answers
from hfkit.ranks import on_main

SCORES = ("rouge1", "rouge2", "rougeL", "bleu", "exact_match")


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


def score(predictions: list[str], references: list[list[str]], intervals: bool = False) -> dict[str, float]:
    """ROUGE (0 to 1), BLEU (0 to 100) and exact match (0 to 1); with `_low` and `_high` their 95 % intervals."""
    found = scoring.statistics(["rouge", "bleu", "exact_match"], predictions, references)
    known = scoring.scores(found) if intervals else {}
    for name, each in found.items():
        known |= {name if key == "score" else key: float(value) for key, value in each.scores().items()}
    return {name: value for name, value in known.items() if name.removesuffix("_low").removesuffix("_high") in SCORES}
