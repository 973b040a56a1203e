"""What `prune` costs."""

from typing import Any

from hfkit.planning.work import Known, Model, Texts, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.prune import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    said = recipe.pruning.model_dump(exclude_none=True)
    losses = recipe.recover.losses if recipe.recover else []
    recovery = " + ".join(f"{each.weight:g} {each.loss}" for each in losses) or "none"
    return {"pruning": ", ".join(f"{key}={value}" for key, value in said.items()), "recovery": recovery}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.planning import parts
    from hfkit.planning.work import Chore, Lengths, Reading, Training

    base, texts = known["model"], known["data"]
    if not isinstance(base, Model) or not isinstance(texts, Texts):
        return parts.unknown(recipe.model if not isinstance(base, Model) else recipe.data)
    whole, model = parts.pruned(base, recipe.pruning)
    length, models = recipe.sequence_length, {"before": base, "pruned": model}
    found: list[Any] = [Chore("pruning", parts.QUANTIZING + parts.weight_bytes(whole) / 1e8)]
    if recipe.pruning.needs_data:
        looked = Reading("looking at text", whole, recipe.calibration_rows, Lengths((length,), length - 1), 8)
        found += [looked] * (2 if recipe.pruning.is_mask else 1)
    cache = 0.0
    if recipe.recover is not None and recipe.train is not None:
        task, packing = recipe.as_task(), recipe.recover.packing
        made = parts.training_rows(task, texts, base.tokens, length, packing)
        batch, losses = parts.batch_of(recipe.train), tuple(recipe.recover.losses)
        teacher = whole if recipe.recover.has_teacher else None
        reads = tuple(parts.reading("evaluating", model, made, "validation", batch))
        count, lengths = parts.row_lengths(made, length)
        training = Training(
            "training",
            model,
            recipe.train,
            count,
            lengths,
            recipe.recover.optimizer.name,
            "sdpa",
            reads,
            teacher,
            losses,
        )
        found += [*parts.making_rows(task, texts, base.tokens, length, packing, recipe.output_dir), training]
        models["recovered"], cache = model, parts.cache_bytes(made)
    return Work(
        [*found, *parts.measuring(recipe.scoring(), models, texts), Chore("scores and intervals", parts.SCORING)],
        makes=model,
        disk=2 * parts.weight_bytes(model),
        cache=cache,
        is_exact=parts.are_exact(texts, base.tokens),
    )
