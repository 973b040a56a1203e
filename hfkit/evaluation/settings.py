"""The recipe keys of whatever is scored on data. Nothing heavy is imported: recipes are checked before torch loads."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hfkit.data.tasks import Task
from hfkit.data.tasks.keys import TaskName, TaskRecipe
from hfkit.metrics.catalogue import CATALOGUE, fitting
from hfkit.recipe.fields import Section

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(each.name for each in CATALOGUE)]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How models are scored.

    Attributes:
        metrics: names of `hfkit.metrics.catalogue`; none where there are no rows to score.
        split: of the data, and the most rows of it (`limit`, None for all).
        tokenize: how metrics cut words.
        batch_size: rows at once on each process.
        generation: arguments of `GenerationConfig`.
    """

    task: Task
    metrics: tuple[str, ...] = ()
    split: str = "test"
    limit: int | None = None
    tokenize: str = "auto"
    batch_size: int = 16
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    trust_remote_code: bool = False


class ScoredRecipe(TaskRecipe):
    """What models are scored on, and how."""

    data: str | None
    task: TaskName = Field(
        "text", description="text: whole documents, by their likelihood. The others as in finetune."
    )
    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = Field(None, ge=1, description="Take no more than this many rows, of benchmarks too.")
    metrics: list[MetricName] | None = Field(
        None,
        min_length=1,
        description="By default all that fit the task. bleu is sacrebleu's, 0 to 100. Of lists of classes accuracy "
        "is exact_match, and f1 also f1_samples.",
    )
    tokenize: str = Field(
        "auto",
        description="How rouge, bleu, length and distinct cut words. auto: by the script of each row's references. "
        "ascii: as rouge_score, not for bleu. Or a tokenizer of sacrebleu: 13a, intl, char, zh, ja-mecab ...",
    )
    batch_size: int = Field(16, ge=1, description="Rows at once on each process.")
    generation: Annotated[dict[str, Any], Section("transformers.GenerationConfig")] = {}
    trust_remote_code: bool = Field(False, description="Run the code that comes with the model.")

    def scoring(self) -> Scoring:
        """Return how the keys say that models are scored."""
        task = self.as_task()
        metrics = () if self.data is None else tuple(self.metrics or fitting(task.measured_by))
        return Scoring(
            task,
            metrics,
            self.split,
            self.limit,
            self.tokenize,
            self.batch_size,
            self.generation,
            self.trust_remote_code,
        )
