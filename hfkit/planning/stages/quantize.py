"""What `quantize` costs."""

from hfkit.planning.work import Known, Model, Texts, Work
from hfkit.recipe.fields import ResolvedInputs
from hfkit.stages.quantize import Recipe


def describe(recipe: Recipe, inputs: ResolvedInputs) -> dict[str, str]:
    scheme = ", ".join(f"{key}={value}" for key, value in recipe.quantization.items())
    return {"method": recipe.method, "scheme": scheme, "scored by": ", ".join(recipe.scoring().metrics)}


def work(recipe: Recipe, known: dict[str, Known]) -> Work:
    import dataclasses

    from hfkit.planning import parts
    from hfkit.planning.work import Chore

    base, texts = known["model"], known["data"]
    if not isinstance(base, Model) or not isinstance(texts, Texts):
        return parts.unknown(recipe.model if not isinstance(base, Model) else recipe.data)
    whole = dataclasses.replace(base, lora=None)
    model = dataclasses.replace(whole, method=recipe.method, quantization=recipe.quantization)
    notes = () if recipe.method == "bitsandbytes" else (f"{recipe.method}: the quantization itself is not counted",)
    return Work(
        [
            Chore("quantizing", parts.QUANTIZING + parts.weight_bytes(whole) / 1e8, 2 * parts.weight_bytes(whole)),
            *parts.measuring(recipe.scoring(), {"before": base, "quantized": model}, texts),
            Chore("scores and intervals", parts.SCORING),
        ],
        makes=model,
        disk=parts.weight_bytes(model),
        notes=notes,
        is_exact=parts.are_exact(texts, base.tokens),
    )
