"""What `pretrain` costs."""

from typing import Any

from hfkit.planning.work import Known, Texts, Tokens, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.pretrain import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    return {"trains": f"a decoder from scratch, {recipe.optimizer.name}", "rows": f"{recipe.sequence_length:,} tokens"}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.model import HfkitConfig
    from hfkit.planning import parts, rows
    from hfkit.planning.work import Chore, Training, Writing
    from hfkit.training import samples as of_samples

    tokens, texts = known["tokenizer"], known["data"]
    defaults: dict[str, Any] = {"max_position_embeddings": recipe.sequence_length}
    if isinstance(tokens, Tokens):
        defaults["vocab_size"] = tokens.vocab_size
    model = parts.model_of(HfkitConfig(**{**defaults, **recipe.model}), tokens)
    given = texts if isinstance(texts, Texts) else None
    found = rows.packed(given, model.tokens, recipe.sequence_length, recipe.packing)
    batch, count = parts.batch_of(recipe.train), len(recipe.prompts or range(3))
    reads = parts.reading("evaluating", model, found, "validation", batch)
    training = Training(
        "training",
        model,
        recipe.train,
        *parts.row_lengths(found, recipe.sequence_length),
        recipe.optimizer.name,
        recipe.attn_implementation,
        tuple(reads),
    )
    test_bytes = given.bytes["test"] if given is not None else 0
    return Work(
        [
            *rows.tokenizing(
                given, model.tokens, parts.cache_of(recipe.output_dir), recipe.sequence_length, recipe.packing
            ),
            training,
            *parts.reading("evaluating", model, found, "validation", batch),
            *parts.reading("evaluating", model, found, "test", batch),
            Chore("xz", 0.05 + (test_bytes * 1e-6 if test_bytes <= of_samples.XZ_LIMIT_BYTES else 0)),
            Writing("samples", model, count, of_samples.PROMPT_TOKENS, of_samples.NEW_TOKENS, 1),
        ],
        makes=model,
        disk=parts.weight_bytes(model),
        cache=parts.cache_bytes(found),
        notes=parts.not_counted(training, found),
        is_exact=given is not None and given.is_exact and isinstance(tokens, Tokens) and tokens.is_exact,
    )
