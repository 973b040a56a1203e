"""What `distill` costs."""

from hfkit.planning.work import Known, Model, Texts, Tokens, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.distill import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
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
    from hfkit.planning.work import Training

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
    settings, length, packing = recipe.settings(), recipe.sequence_length, recipe.packing
    found = parts.training_rows(settings.task, texts, own, length, packing)
    batch = parts.batch_of(recipe.train)
    asked = (settings.task, recipe.generation, model, texts, recipe.evaluation_rows, length, batch)
    at_evaluations = (
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
        at_evaluations,
        teacher,
        tuple(recipe.losses),
        ("lora",),
    )
    after = [
        each for split in ("test", "validation") for each in parts.reading("evaluating", model, found, split, batch)
    ]
    answers = parts.answering("evaluating", *asked)
    of_teacher = [
        each
        for split in ("test", "validation")
        for each in parts.reading("the teacher's scores", teacher, found, split, batch)
    ]
    alone = dataclasses.replace(training, what="training alone", teacher=None, losses=())
    return Work(
        [
            *parts.making_rows(settings.task, texts, own, length, packing, recipe.output_dir),
            *parts.of_targets(settings, teacher, found, texts, batch),
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
