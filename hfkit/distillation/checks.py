"""What a recipe of a distillation gets wrong, as far as it can be known before a model is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.data import corpus
from hfkit.data.chat import problem_with_template
from hfkit.data.tasks.base import Problems
from hfkit.data.tasks.checks import check_data
from hfkit.data.tokenizer import load_tokenizer
from hfkit.distillation import vocabulary
from hfkit.distillation.settings import Distillation, Loss, check_losses, layer_pairs
from hfkit.distillation.student import cut_of, student_config
from hfkit.errors import HfkitError
from hfkit.model.adapters import refuse_adapter
from hfkit.model.loading import load_config
from hfkit.model.vocabulary import ids_of
from hfkit.recipe.fields import ResolvedInputs
from hfkit.runtime.distributed import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def problems(settings: Distillation, inputs: ResolvedInputs) -> Problems:
    """Yield each key that is wrong, with what is wrong about it. A model that is still to be made is looked at as its
    recipe describes it."""
    yield from check_losses(settings.losses, settings.targets, settings.cross_tokenizer)
    yield from _data_problems(settings, inputs)
    if isinstance(settings.student, dict) and "from_teacher" in settings.student and len(settings.student) > 1:
        others = ", ".join(sorted(set(settings.student) - {"from_teacher"}))
        yield "student", f"from_teacher takes everything else from the teacher, and cannot stand beside {others}"
        return
    if settings.lora is not None and "student" not in inputs:
        yield "lora", "an adapter needs a base that is there to be loaded; name a folder or an id as `student:`"
    if "student" in inputs and (problem := refuse_adapter(inputs["student"].path)):
        yield "student", problem
        return
    configs: dict[str, Any] = {}
    for key in ("teacher", "student"):
        try:
            configs[key] = _config(key, settings, inputs, configs.get("teacher"))
        except HfkitError as error:
            yield key, str(error)
            return
    yield from _model_problems(settings, **configs)
    is_made = all(resolved.exists for key, resolved in inputs.items() if key != "data")
    if is_made:
        try:
            shared_width(settings, inputs)
            if "student" in inputs:
                own = tokenizer_path(inputs)
                ids_of(load_tokenizer(own), configs["student"].vocab_size, own)
        except HfkitError as error:
            yield next(key for key in ("student", "tokenizer", "teacher") if key in inputs), str(error)
            return
    if is_made and settings.task.is_chat:
        yield from _chat_problems(settings, inputs)


def _chat_problems(settings: Distillation, inputs: ResolvedInputs) -> Problems:
    try:
        tokenizer = load_tokenizer(tokenizer_path(inputs), chat_template=settings.task.chat_template)
    except HfkitError as error:
        yield "chat_template", str(error)
        return
    if problem := problem_with_template(tokenizer):
        yield "chat_template", problem
    elif inputs["data"].exists:
        rows = corpus.rows(inputs["data"].path, "train")
        yield from settings.task.row_problems(rows, tokenizer, "the train split")


def _data_problems(settings: Distillation, inputs: ResolvedInputs) -> Problems:
    task, data = settings.task, inputs["data"]
    yield from check_data(task, data)
    if task.is_chat and settings.cross_tokenizer is not None:
        yield "cross_tokenizer", "chats are written by each tokenizer's own template; use `task: generate`"
    source = settings.targets.source
    if source == "on_policy" and settings.cross_tokenizer is not None:
        rule = "the teacher scores the student's own tokens, which takes one tokenizer"
        yield "targets.source", f"on_policy: {rule}; use `source: online`, or delete cross_tokenizer"
    if source in ("generated", "on_policy") and task.is_text:
        yield "targets.source", f"{source}: whole texts have no prompts; use `task: generate` or `task: chat`"
    if source == "generated":
        yield from task.rewriting_problems()
        if data.recipe is None and not Path(data.path).is_dir():
            yield "data", f"{data.path}: generated targets need a prepared folder; prepare it first"


def _config(
    key: str, settings: Distillation, inputs: ResolvedInputs, teacher: "PretrainedConfig | None"
) -> "PretrainedConfig | None":
    """Return the configuration of the teacher or the student; None where it is not known yet.

    Raises:
        HfkitError: if a place holds none, or the recipe describes none.
    """
    if key not in inputs:
        assert isinstance(settings.student, dict), "a student that is no place is described"
        return student_config(settings.student, teacher)
    path, recipe = inputs[key].path, inputs[key].recipe
    config = None
    if inputs[key].exists:
        config = load_config(path, settings.trust_remote_code)
    elif recipe is not None:
        fields = getattr(recipe, "model", None)  # of a pretraining its fields, of a fine-tuning a place
        config = student_config(fields, None) if isinstance(fields, dict) else None
    if config is not None and config.is_encoder_decoder:
        raise HfkitError(f"{path}: is an encoder-decoder, and only decoders are distilled; name a causal model")
    return config.get_text_config() if config is not None else None


def _model_problems(
    settings: Distillation, teacher: "PretrainedConfig | None", student: "PretrainedConfig | None"
) -> Problems:
    """Yield what does not fit the configurations, as far as they are known."""
    for key, config in (("teacher", teacher), ("student", student)):
        longest = getattr(config, "max_position_embeddings", None)
        is_named = key == "teacher" or isinstance(settings.student, str)
        if is_named and longest is not None and settings.sequence_length > longest:
            yield "sequence_length", f"must be at most the {key}'s {longest} positions, got {settings.sequence_length}"
    if (cut := cut_of(settings.student)) and teacher is not None:
        from hfkit.model.slicing import check_slice

        for key, problem in check_slice(teacher, **cut.model_dump()):
            yield f"student.from_teacher.{key}", problem
    is_given = isinstance(settings.student, str) and student is not None
    if is_given and settings.lora is None and getattr(student, "quantization_config", None) is not None:
        rule = "quantized weights cannot be trained; add `lora: {}` to train an adapter"
        yield "student", f"{settings.student}: {rule}, or name the model that it was made from"
    for index, loss in enumerate(settings.losses):
        if loss.spec.compares != "layers":
            continue
        if loss.way == "maps" and settings.attn_implementation != "eager":
            rule = "attention maps are given by `attn_implementation: eager` only; set it, or use `kind: relations`"
            yield f"losses.{index}.kind", rule
        if teacher is None or student is None:
            continue
        yield from of_layers(loss, index, student, teacher)
        is_mapped = loss.loss == "hidden_states" and student.hidden_size != teacher.hidden_size
        if is_mapped and loss.projection is not False and settings.lora is not None:
            what = f"hidden_states: {_widths(student, teacher)}, and a map between them"
            yield f"losses.{index}", f"{what} is not learned with `lora`"


def of_layers(loss: Loss, index: int, student: "PretrainedConfig", teacher: "PretrainedConfig") -> Problems:
    """Yield what is wrong with a loss between layers, that of an index.

    Args:
        student, teacher: their configurations.
    """
    for pair in layer_pairs(loss, student, teacher):
        for layer, config, whose in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
            if layer >= config.num_hidden_layers:
                bounds = f"the {whose} has the layers 0 to {config.num_hidden_layers - 1}"
                yield f"losses.{index}.layers", f"{pair}: {bounds}, counted from 0; correct the pair"
    if loss.loss == "hidden_states" and loss.projection is False and student.hidden_size != teacher.hidden_size:
        rule = "delete the key to learn a map between them"
        yield f"losses.{index}.projection", f"false: {_widths(student, teacher)}; {rule}"


def _widths(student: "PretrainedConfig", teacher: "PretrainedConfig") -> str:
    return f"the student has {student.hidden_size} channels, the teacher {teacher.hidden_size}"


def tokenizer_path(inputs: ResolvedInputs) -> str:
    """Return where the student's tokenizer is from."""
    return next(inputs[key].path for key in ("tokenizer", "student", "teacher") if key in inputs)


def shared_width(settings: Distillation, inputs: ResolvedInputs) -> int:
    """Return how many leading logits stand for the same tokens in teacher and student.

    Raises:
        HfkitError: if the two have different vocabularies, and the recipe does not say `cross_tokenizer`.
    """
    teacher = inputs["teacher"].path
    if settings.cross_tokenizer is not None:  # all of the teacher's are compared, sorted
        return len(load_tokenizer(teacher))
    return vocabulary.compare(teacher, tokenizer_path(inputs), settings.trust_remote_code).width


def warn_of_small_teacher(path: str, student: "PreTrainedModel", trust_remote_code: bool) -> None:
    """Warn where the teacher has fewer parameters than the student."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if (theirs := model.num_parameters()) < (own := student.num_parameters()):
        say(f"  WARNING: the teacher has fewer parameters than the student, {theirs:,} and {own:,}: is that meant?")
