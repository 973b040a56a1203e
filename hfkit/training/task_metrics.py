"""How well a model does its task: texts generated for rows of a split, scored."""

import dataclasses
import itertools
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkit.data import corpus
from hfkit.data.tasks import Task
from hfkit.data.tasks.checks import check_answers
from hfkit.errors import HfkitError
from hfkit.inference.generation import answers, generation_of, prompts_of
from hfkit.metrics import scoring
from hfkit.metrics.catalogue import CATALOGUE, of_answers
from hfkit.runtime.distributed import on_main


@dataclasses.dataclass(frozen=True)
class TaskMetrics:
    """ROUGE, BLEU and the share of exact matches of what a model generates.

    Args:
        data: the prepared data.
        generation: arguments of `GenerationConfig`.
        window: tokens that prompt and answer have together.
        count: rows of a split, the first of them.
    """

    task: Task
    data: str
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    generation: dict[str, Any]
    window: int
    count: int

    def __call__(self, model: PreTrainedModel, split: str) -> dict[str, float]:
        """Return the scores of the first rows of a split; on test with intervals. Call it on every process."""
        rows = self.rows(split)
        predictions = answers(self.task, rows, self.generation, model, self.tokenizer, self.batch_size, self.window)
        references = [self.task.references(row) for row in rows]
        return on_main("task metrics", lambda: score(predictions, references, intervals=split == "test"))

    def rows(self, split: str) -> list[corpus.Row]:
        return list(itertools.islice(corpus.rows(self.data, split), self.count))

    def refuse_rows(self) -> None:
        """Raise an HfkitError for rows that nothing can be written for, or that no text can be scored on: hours into a
        training is too late."""
        for split in ("validation", "test") if self.task.has_answers else ():
            rows = self.rows(split)
            for key, problem in check_answers(self.task, rows, split):
                raise HfkitError(f"{key}: {problem}")
            generation = generation_of(self.task, self.generation, self.tokenizer, self.window)
            prompts_of(self.task, rows, self.tokenizer, self.window, generation, False)


def score(predictions: list[str], references: list[list[str]], intervals: bool = False) -> dict[str, float]:
    """Return ROUGE (0 to 1), BLEU (0 to 100), exact match (0 to 1); as `_low` and `_high` their 95 % intervals."""
    names = of_answers()
    metrics = [metric.name for metric in CATALOGUE if metric.in_training]
    statistics = scoring.statistics(metrics, predictions, references)
    scores = scoring.scores(statistics) if intervals else {}
    for name, statistic in statistics.items():
        scores |= {name if key == "score" else key: float(value) for key, value in statistic.scores().items()}
    return {name: value for name, value in scores.items() if name.removesuffix("_low").removesuffix("_high") in names}
