"""How well a model does its task: texts generated for rows of a split, scored."""

import itertools
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.data import corpus
from hfkit.data.tasks import reference
from hfkit.evaluation import load_metric
from hfkit.evaluation.generation import answers
from hfkit.ranks import on_main


class TaskMetrics:
    """ROUGE, BLEU and the share of exact matches of what a model generates.

    Args:
        recipe: with the task; its `generation:` holds arguments of `GenerationConfig`.
        data: the prepared data.
    """

    def __init__(self, recipe: Any, data: str, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.recipe, self.data, self.tokenizer, self.batch_size = recipe, data, tokenizer, batch_size

    def __call__(self, model: Any, split: str, count: int) -> dict[str, float]:
        """Of the first `count` rows of a split. Call it on every process."""
        rows = list(itertools.islice(corpus.rows(self.data, split), count))
        predictions = answers(self.recipe, rows, model, self.tokenizer, self.batch_size, self.recipe.sequence_length)
        return on_main("task metrics", lambda: score(predictions, [reference(self.recipe, row) for row in rows]))


def score(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """ROUGE (0 to 1), BLEU (0 to 100) and exact match (0 to 1)."""
    rouge = load_metric("rouge").compute(predictions=predictions, references=references) or {}
    bleu = load_metric("sacrebleu").compute(predictions=predictions, references=references) or {}
    first = [each[0] for each in references]
    exact = load_metric("exact_match").compute(predictions=predictions, references=first) or {}
    found = {"rouge1": rouge["rouge1"], "rouge2": rouge["rouge2"], "rougeL": rouge["rougeL"]}
    found |= {"bleu": bleu["score"], "exact_match": exact["exact_match"]}
    return {name: float(value) for name, value in found.items()}
