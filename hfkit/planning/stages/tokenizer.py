"""What `tokenizer` costs."""

import time

from hfkit.planning.work import Chore, Known, Texts, Tokens, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.tokenizer import Recipe, train, wrapped

LOADING, GROWTH = 1.0, 0.7  # of a plan: seconds around the training, whose time grows with the text to this power


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    return {"vocabulary": f"{recipe.vocab_size:,} tokens, {recipe.algorithm}"}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    texts = known["data"]
    sample = [row["text"] for row in texts.sample if "text" in row] if isinstance(texts, Texts) else []
    if not isinstance(texts, Texts) or not sample:
        notes = ("how long it takes is not known, as the data is not",)
        return Work([], makes=Tokens(recipe.vocab_size, None, False), notes=notes, is_exact=False)
    begun = time.perf_counter()
    backend = train(recipe, iter(sample), is_shown=False)
    taken, looked = time.perf_counter() - begun, sum(len(text.encode()) for text in sample)
    size = min(texts.bytes["train"], recipe.sample_bytes)
    memory = 6e7 + 15 * min(size, 1e8)
    return Work(
        [Chore("training", LOADING + taken * max(size / looked, 1.0) ** GROWTH, memory)],
        makes=Tokens(recipe.vocab_size, wrapped(backend), False),
        disk=100.0 * recipe.vocab_size,
        is_exact=texts.is_exact,
    )
