"""The recipe keys of whatever is scored on data. Nothing heavy is imported: recipes are checked before torch loads."""

from typing import Annotated, Any, Literal

from pydantic import Field

from hfkit.data.tasks import TaskRecipe
from hfkit.recipe import Section

Metric = Literal[
    "perplexity", "bits_per_byte", "bleu", "chrf", "rouge", "exact_match", "accuracy", "f1", "length", "distinct"
]
OF_ANSWERS = ["rouge", "bleu", "chrf", "exact_match", "perplexity", "bits_per_byte", "length", "distinct"]
FITTING: dict[str, list[str]] = {
    "text": ["perplexity", "bits_per_byte"],
    "generate": OF_ANSWERS,
    "chat": OF_ANSWERS,
    "classify": ["accuracy", "f1"],  # of lists of classes accuracy is their exact match
}


# Which score stands for a model's quality: the first of these that was taken.
QUALITY = ("accuracy", "f1", "rougeL", "chrf", "bleu", "exact_match", "bits_per_byte", "perplexity")


class ScoredRecipe(TaskRecipe):
    """What models are scored on, and how."""

    data: str | None
    task: Literal["text", "generate", "chat", "classify"] = Field(
        "text", description="text: whole documents, by their likelihood. The others as in finetune."
    )
    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = Field(None, ge=1, description="Take no more than this many rows, of benchmarks too.")
    metrics: list[Metric] | None = Field(
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
        return [] if self.data is None else list(self.metrics or FITTING[self.task])
