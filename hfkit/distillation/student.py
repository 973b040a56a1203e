"""The student: a new model, one that is there already, or one cut out of its teacher."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfkit.distillation.settings import Distillation, FromTeacher
from hfkit.recipe.fields import Arguments, ResolvedInputs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Described = str | dict[str, Any]


def cut_of(student: Described) -> FromTeacher | None:
    """Return what of the teacher the student is cut out of, if it is."""
    if isinstance(student, dict) and student.get("from_teacher") is not None:
        return FromTeacher.model_validate(student["from_teacher"])
    return None


def make_student(
    settings: Distillation,
    inputs: ResolvedInputs,
    tokenizer: "PreTrainedTokenizerBase",
    teacher: Callable[[], "PreTrainedModel"],
) -> "PreTrainedModel":
    """Return the student with its first weights, in float32; with an adapter to be trained where `lora` is set.

    Args:
        teacher: loads the model; called only if the student is cut out of it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from hfkit.model.adapters import adapt
    from hfkit.model.loading import load_model, new_config
    from hfkit.model.slicing import sliced
    from hfkit.model.vocabulary import grow

    model: Any
    if "student" in inputs:
        model = load_model(
            inputs["student"].path,
            dtype=torch.float32,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
        )
        grow(model, tokenizer, inputs.get("tokenizer", inputs["student"]).path)
    elif cut := cut_of(settings.student):
        model = sliced(teacher(), **cut.model_dump()).float().requires_grad_(True)
        model.set_attn_implementation(settings.attn_implementation)
    else:
        assert isinstance(settings.student, dict), "a student that is no place is described"
        config = new_config(settings.student, tokenizer, settings.sequence_length)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.attn_implementation)
    return model if settings.lora is None else adapt(model, settings.lora, has_classes=False, is_quantized=False)


def student_config(student: Arguments, teacher: "PreTrainedConfig | None") -> "PreTrainedConfig | None":
    """Return the sizes of a student that is still to be made, as far as they are known before tokenizer and teacher
    are."""
    from hfkit.model import HfkitConfig

    cut = cut_of(student)
    if cut is None:
        return HfkitConfig(**student)
    if teacher is None:
        return None
    config = copy.deepcopy(teacher)
    config.num_hidden_layers = len(cut.layers) if cut.layers is not None else teacher.num_hidden_layers
    config.hidden_size = cut.hidden_size or teacher.hidden_size
    return config
