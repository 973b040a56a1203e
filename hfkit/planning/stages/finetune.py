"""What `finetune` costs."""

from hfkit.planning.work import Known, Model, Texts, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.finetune import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    return {
        "task": recipe.task,
        "trains": "all weights" if recipe.lora is None else "an adapter (LoRA)",
        "tokens a row": f"{recipe.sequence_length:,}",
    }


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    from hfkit.planning import parts, rows
    from hfkit.planning.work import Chore, Training

    base, texts = known["model"], known["data"] if isinstance(known["data"], Texts) else None
    if not isinstance(base, Model):
        return parts.unknown(recipe.model)
    task, sample = recipe.as_task(), texts.sample if texts is not None else []
    names = {name for row in sample if task.has_classes and task.label in row for name in task.references(row)}
    classes = len(names) if texts is not None else 2
    method = "bitsandbytes" if recipe.quantization is not None else ""
    model = Model(
        base.config,
        base.tokens,
        classes if task.has_classes else 0,
        recipe.lora,
        method or base.method,
        recipe.quantization or base.quantization,
    )
    is_packed = recipe.packing and not task.has_classes
    found = rows.examples(task, texts, model.tokens, recipe.sequence_length, is_packed)
    batch, length, most = parts.batch_of(recipe.train), recipe.sequence_length, recipe.evaluation_rows
    asked = (task, recipe.generation, model, texts, most, length, batch)
    does = (
        *parts.reading("evaluating", model, found, "validation", batch),
        *parts.answering("evaluating", *asked),
    )
    training = Training(
        "training",
        model,
        recipe.train,
        *parts.row_lengths(found, length),
        recipe.optimizer.name,
        recipe.attn_implementation,
        does,
        may=("lora", "quantization"),
    )
    merged = [Chore("merging", 2.0 + parts.weight_bytes(base) / 1e8)] if recipe.merge else []
    return Work(
        [
            *parts.making_rows(task, texts, model.tokens, length, "", recipe.output_dir),
            training,
            *parts.reading("evaluating", model, found, "validation", batch),
            *parts.reading("evaluating", model, found, "test", batch),
            *parts.answering("evaluating", *asked),
            *merged,
            *(parts.measuring_costs({"before": base, "result": model}, recipe.accept)),
        ],
        makes=model,
        disk=parts.weight_bytes(model) + (parts.weight_bytes(base) if recipe.merge else 0),
        cache=parts.cache_bytes(found),
        notes=parts.not_counted(training, found),
        is_exact=parts.are_exact(texts, model.tokens),
    )
