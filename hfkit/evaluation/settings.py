"""The recipe keys of whatever is scored on data. Nothing heavy is imported: recipes are checked before torch loads."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hfkit.data.tasks import TaskRecipe
from hfkit.metrics.catalogue import CATALOGUE, fitting
from hfkit.recipe.fields import Section

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(each.name for each in CATALOGUE)]


class ScoredRecipe(TaskRecipe):
    """What models are scored on, and how."""

    data: str | None
    task: Literal["text", "generate", "chat", "classify"] = Field(
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

    @property
    def chosen(self) -> list[str]:
        """The metrics that are taken."""
        return [] if self.data is None else list(self.metrics or fitting(self.task))
