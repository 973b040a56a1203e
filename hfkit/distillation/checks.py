"""What a recipe of a distillation gets wrong, as far as it can be known before a model is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfkit.data import corpus
from hfkit.data.chat import problem_with_template
from hfkit.data.tasks import check_chats, check_data, fields_of
from hfkit.data.tokenizer import load_tokenizer
from hfkit.distillation import vocabulary
from hfkit.distillation.settings import check_losses, layer_pairs
from hfkit.distillation.student import cut_of, student_config
from hfkit.errors import HfkitError
from hfkit.model.adapters import refuse_adapter
from hfkit.model.loading import load_config
from hfkit.model.vocabulary import ids_of
from hfkit.recipe.fields import StageRecipe, is_there
from hfkit.runtime.distributed import say

Problems = Iterator[tuple[str, str]]


def problems(recipe: Any, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Problems:
    """Each key that is wrong, with what is wrong about it. A model that is still to be made is looked at as its recipe
    describes it."""
    yield from check_losses(recipe.losses, recipe.targets, recipe.cross_tokenizer)
    yield from _data_problems(recipe, places, recipes)
    if isinstance(recipe.student, dict) and "from_teacher" in recipe.student and len(recipe.student) > 1:
        others = ", ".join(sorted(set(recipe.student) - {"from_teacher"}))
        yield "student", f"from_teacher takes everything else from the teacher, and cannot stand beside {others}"
        return
    if recipe.lora is not None and "student" not in places:
        yield "lora", "an adapter needs a base that is there to be loaded; name a folder or an id as `student:`"
    if "student" in places and (problem := refuse_adapter(places["student"])):
        yield "student", problem
        return
    configs: dict[str, Any] = {}
    for key in ("teacher", "student"):
        try:
            configs[key] = _config(key, recipe, places, recipes, configs.get("teacher"))
        except HfkitError as error:
            yield key, str(error)
            return
    yield from _model_problems(recipe, **configs)
    is_made = all(is_there(place, recipes.get(key)) for key, place in places.items() if key != "data")
    if is_made:
        try:
            shared_width(recipe, places)
            if "student" in places:
                own = tokenizer_place(places)
                ids_of(load_tokenizer(own), configs["student"].vocab_size, own)
        except HfkitError as error:
            yield "student" if "student" in places else "tokenizer" if "tokenizer" in places else "teacher", str(error)
            return
    if is_made and recipe.task == "chat":
        yield from _chat_problems(recipe, places, recipes)


def _chat_problems(recipe: Any, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Problems:
    try:
        tokenizer = load_tokenizer(tokenizer_place(places), chat_template=recipe.chat_template)
    except HfkitError as error:
        yield "chat_template", str(error)
        return
    if problem := problem_with_template(tokenizer):
        yield "chat_template", problem
    elif is_there(places["data"], recipes.get("data")):
        yield from check_chats(recipe, corpus.rows(places["data"], "train"), tokenizer, "the train split")


def _data_problems(recipe: Any, places: dict[str, str], recipes: dict[str, StageRecipe]) -> Problems:
    yield from check_data(recipe, places["data"], recipes.get("data"))
    if recipe.task == "chat" and recipe.cross_tokenizer is not None:
        yield "cross_tokenizer", "chats are written by each tokenizer's own template; use `task: generate`"
    source = recipe.targets.source
    if source == "on_policy" and recipe.cross_tokenizer is not None:
        rule = "the teacher scores the student's own tokens, which takes one tokenizer"
        yield "targets.source", f"on_policy: {rule}; use `source: online`, or delete cross_tokenizer"
    if source in ("generated", "on_policy") and recipe.task == "text":
        yield "targets.source", f"{source}: whole texts have no prompts; use `task: generate` or `task: chat`"
    if source == "generated":
        if recipe.task == "generate" and recipe.completion != f"{{{''.join(fields_of(recipe.completion))}}}":
            yield "completion", f"{recipe.completion!r}: must be one column alone, which the teacher writes anew"
        if "data" not in recipes and not Path(places["data"]).is_dir():
            yield "data", f"{places['data']}: generated targets need a prepared folder; prepare it first"


def _config(key: str, recipe: Any, places: dict[str, str], recipes: dict[str, StageRecipe], teacher: Any) -> Any:
    """The configuration of the teacher or the student; None where it is not known yet.

    Raises:
        HfkitError: if a place holds none, or the recipe describes none.
    """
    if key == "student" and "student" not in places:
        return student_config(recipe.student, teacher)
    place = places[key]
    config = None
    if is_there(place, recipes.get(key)):
        config = load_config(place, recipe.trust_remote_code)
    elif key in recipes:
        fields = getattr(recipes[key], "model", None)  # of a pretraining its fields, of a fine-tuning a place
        config = student_config(fields, None) if isinstance(fields, dict) else None
    if config is not None and config.is_encoder_decoder:
        raise HfkitError(f"{place}: is an encoder-decoder, and only decoders are distilled; name a causal model")
    return config.get_text_config() if config is not None else None


def _model_problems(recipe: Any, teacher: Any, student: Any) -> Problems:
    """What does not fit the configurations, as far as they are known."""
    for key, config in (("teacher", teacher), ("student", student)):
        longest = getattr(config, "max_position_embeddings", None)
        given = key == "teacher" or isinstance(recipe.student, str)
        if given and longest is not None and recipe.sequence_length > longest:
            yield "sequence_length", f"must be at most the {key}'s {longest} positions, got {recipe.sequence_length}"
    if (cut := cut_of(recipe.student)) and teacher is not None:
        from hfkit.model.slicing import check_slice

        for key, problem in check_slice(teacher, **cut.model_dump()):
            yield f"student.from_teacher.{key}", problem
    is_given = isinstance(recipe.student, str) and student is not None
    if is_given and recipe.lora is None and getattr(student, "quantization_config", None) is not None:
        rule = "quantized weights cannot be trained; add `lora: {}` to train an adapter"
        yield "student", f"{recipe.student}: {rule}, or name the model that it was made from"
    for index, loss in enumerate(recipe.losses):
        if loss.spec.compares != "layers":
            continue
        if loss.way == "maps" and recipe.attn_implementation != "eager":
            rule = "attention maps are given by `attn_implementation: eager` only; set it, or use `kind: relations`"
            yield f"losses.{index}.kind", rule
        if teacher is None or student is None:
            continue
        yield from of_layers(loss, index, student, teacher)
        is_mapped = loss.loss == "hidden_states" and student.hidden_size != teacher.hidden_size
        if is_mapped and loss.projection is not False and recipe.lora is not None:
            what = f"hidden_states: {_widths(student, teacher)}, and a map between them"
            yield f"losses.{index}", f"{what} is not learned with `lora`"


def of_layers(loss: Any, index: int, student: Any, teacher: Any) -> Problems:
    """What is wrong with a loss between layers, that of an index.

    Args:
        student, teacher: their configurations.
    """
    for pair in layer_pairs(loss, student, teacher):
        for layer, config, whose in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
            if layer >= config.num_hidden_layers:
                known = f"the {whose} has the layers 0 to {config.num_hidden_layers - 1}"
                yield f"losses.{index}.layers", f"{pair}: {known}, counted from 0; correct the pair"
    if loss.loss == "hidden_states" and loss.projection is False and student.hidden_size != teacher.hidden_size:
        rule = "delete the key to learn a map between them"
        yield f"losses.{index}.projection", f"false: {_widths(student, teacher)}; {rule}"


def _widths(student: Any, teacher: Any) -> str:
    return f"the student has {student.hidden_size} channels, the teacher {teacher.hidden_size}"


def tokenizer_place(places: dict[str, str]) -> str:
    """Where the student's tokenizer is from."""
    return next(places[key] for key in ("tokenizer", "student", "teacher") if key in places)


def shared_width(recipe: Any, places: dict[str, str]) -> int:
    """How many leading logits stand for the same tokens in teacher and student.

    Raises:
        HfkitError: if the two have different vocabularies, and the recipe does not say `cross_tokenizer`.
    """
    if recipe.cross_tokenizer is not None:  # all of the teacher's are compared, sorted
        return len(load_tokenizer(places["teacher"]))
    return vocabulary.compare(places["teacher"], tokenizer_place(places), recipe.trust_remote_code).width


def warn_of_small_teacher(recipe: Any, place: str, student: Any) -> None:
    """Say it where the teacher has fewer parameters than the student."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(place, recipe.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
    if (theirs := model.num_parameters()) < (own := student.num_parameters()):
        say(f"  WARNING: the teacher has fewer parameters than the student, {theirs:,} and {own:,}: is that meant?")
