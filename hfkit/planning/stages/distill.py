"""What `distill` costs."""

from typing import Any

from hfkit.planning.work import Known, Model, Texts, Tokens, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.distill import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, Any]:
    return {
        "task": recipe.task,
        "losses": " + ".join(f"{each.weight:g} {each.loss}" for each in recipe.losses if each.weight),
        "targets": recipe.targets.source,
        "trains": "a student" + (", and the same with cross-entropy alone" if recipe.baseline else ""),
    }


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    import dataclasses

    from hfkit.distillation.student import student_config
    from hfkit.planning import parts

    teacher, texts = known["teacher"], known["data"] if isinstance(known["data"], Texts) else None
    given, tokens = known.get("student"), known.get("tokenizer")
    if not isinstance(teacher, Model) or ("student" in known and not isinstance(given, Model)):
        return parts.unknown(*(place for place in (recipe.teacher, recipe.student) if isinstance(place, str)))
    own = given.tokens if isinstance(given, Model) else tokens if isinstance(tokens, Tokens) else teacher.tokens
    if isinstance(given, Model):
        model = dataclasses.replace(given, lora=recipe.lora)
    else:
        defaults = {"max_position_embeddings": recipe.sequence_length} | (
            {"vocab_size": own.vocab_size} if own else {}
        )
        described = recipe.student if isinstance(recipe.student, dict) else {}
        sizes = described if described.get("from_teacher") else {**defaults, **described}
        model = Model(student_config(sizes, teacher.config), own, lora=recipe.lora)
    found = parts.training_rows(recipe, texts, own, True, recipe.packing)
    batch, most = parts.batch_of(recipe.train), recipe.evaluation_rows
    at_evaluations = (
        *parts.reading("evaluating", model, found, "validation", batch, "evaluation"),
        *parts.answering("evaluating", recipe, model, texts, most, recipe.sequence_length, batch, "evaluation"),
    )
    more = {"teacher": teacher, "losses": tuple(recipe.losses), "may": ("lora",)}
    training = parts.training(recipe, model, found, at_evaluations, **more)
    after = [
        each for split in ("test", "validation") for each in parts.reading("evaluating", model, found, split, batch)
    ]
    answers = parts.answering("evaluating", recipe, model, texts, most, recipe.sequence_length, batch)
    of_teacher = [
        each
        for split in ("test", "validation")
        for each in parts.reading("the teacher's scores", teacher, found, split, batch, "teacher")
    ]
    alone = dataclasses.replace(training, what="training alone", teacher=None, losses=())
    return Work(
        [
            *parts.making_rows(recipe, texts, own, recipe.packing),
            *parts.of_targets(recipe, teacher, found, texts, batch),
            training,
            *after,
            *answers,
            *of_teacher,
            *([alone, *after, *answers] if recipe.baseline else []),
            *parts.measuring_costs({"teacher": teacher, "student": model}, recipe.accept),
        ],
        makes=model,
        disk=parts.weight_bytes(model),
        cache=parts.cache_bytes(found),
        notes=parts.not_counted(training, found),
        is_exact=parts.are_exact(texts, own),
    )
