"""What an evaluation cannot be made of, told before a model is loaded: problems of the recipe's keys."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from hfkit.artifacts.manifest import is_adapter
from hfkit.data.corpus import read_split
from hfkit.data.tasks import check_answers, check_chats, check_data, check_room, classes_of, is_multi_label
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError, did_you_mean, shown
from hfkit.inference import classes as of_config
from hfkit.metrics import scripts
from hfkit.metrics.catalogue import fitting, named, score_names
from hfkit.model.loading import is_classifier, load_config, window_of
from hfkit.model.vocabulary import ids_of
from hfkit.recipe import limits
from hfkit.recipe.fields import StageRecipe, is_there

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Problems = Iterator[tuple[str, str]]


def of_scoring(
    recipe: Any, places: dict[str, str], recipes: dict[str, StageRecipe], models: dict[str, str]
) -> Problems:
    """What is wrong with how models are to be scored, as far as it can be told before they are loaded.

    Args:
        models: the places of the models, by their keys. Those that are not there yet are not looked at.
    """
    for index, name in enumerate(recipe.chosen):
        if name not in fitting(recipe.task):
            allowed = ", ".join(fitting(recipe.task))
            yield f"metrics.{index}", f"{name} does not fit `task: {recipe.task}`; those that do: {allowed}"
    yield from of_words(recipe.tokenize, recipe.chosen)
    problems = list(check_data(recipe, places["data"], recipes.get("data"))) if "data" in places else []
    present = {key: place for key, place in models.items() if is_there(place, recipes.get(key))}
    for key, place in present.items() if not problems else ():
        problems += of_model(recipe, key, place)
    yield from problems
    if not problems and "data" in places and is_there(places["data"], recipes.get("data")):
        yield from of_rows(recipe, read_split(places["data"], recipe.split, recipe.limit), present)


def of_smaller(
    recipe: Any, places: dict[str, str], recipes: dict[str, StageRecipe], own: Callable[[Any, str], Problems]
) -> Problems:
    """What is wrong with a recipe that makes a model smaller and scores it beside what it was.

    Args:
        own: what the stage itself has against a model, from the recipe and the model's place.
    """
    yield from of_quality(recipe)
    if is_there(places["model"], recipes.get("model")):
        try:
            yield from own(recipe, places["model"])
        except HfkitError as error:
            yield "model", str(error)
            return
    yield from of_scoring(recipe, places, recipes, {"model": places["model"]})
    known = measured(recipe, places, recipes)
    yield from limits.problems(recipe.accept, known, known, "the model before")


def measured(recipe: Any, places: dict[str, str], recipes: dict[str, StageRecipe]) -> list[str]:
    """The names of what is measured of a model that is scored on data, which limits may be on."""
    several = is_multi_label(recipe, places["data"], recipes.get("data"))
    return [*score_names(recipe.chosen, several), *limits.COSTS]


def refuse(recipe: Any, rows: list[dict[str, Any]], models: dict[str, str]) -> None:
    """The same of models and rows that are all there by now.

    Raises:
        HfkitError: with every problem.
    """
    problems = [each for key, place in models.items() for each in of_model(recipe, key, place)]
    problems += of_rows(recipe, rows, models) if not problems else []
    if problems:
        raise HfkitError(*(f"{key}: {problem}" for key, problem in problems))


def of_quality(recipe: Any) -> Problems:
    """What is wrong with metrics by which no model is better than another."""
    if not any(each.quality for each in named(recipe.chosen)):
        allowed = ", ".join(each.name for each in named(fitting(recipe.task)) if each.quality)
        yield "metrics", f"{', '.join(recipe.chosen)}: none says which model is better; add one of {allowed}"


def of_words(name: str, metrics: list[str]) -> Problems:
    """What is wrong with how metrics are to cut words."""
    if name not in scripts.names():
        yield "tokenize", f"{shown(name)} is not known, {did_you_mean(name, scripts.names())}"
        return
    if name == "ascii" and "bleu" in metrics:
        yield "tokenize", "'ascii' is rouge_score's and not for bleu; use 'auto' or '13a', or leave bleu out"
    elif name not in scripts.OWN_NAMES and any(each.cuts_words for each in named(metrics)):
        try:
            scripts.bleu_tokenizer(name)
        except HfkitError as error:
            yield "tokenize", str(error).removeprefix("tokenize: ")


def of_tokens(models: dict[str, str], recipes: dict[str, StageRecipe], key: str) -> Problems:
    """What is wrong with a key that compares the perplexity of models, where their tokens are different."""
    present = [place for key, place in models.items() if is_there(place, recipes.get(key))]
    vocabularies = {place: load_tokenizer(place, "generate").get_vocab() for place in present}
    for place in present[1:]:
        if vocabularies[place] != vocabularies[present[0]]:
            rule = f"is per token, and {place} has other tokens than {present[0]}; use bits_per_byte"
            yield key, f"perplexity {rule}"
            return


def of_model(recipe: Any, key: str, place: str) -> Problems:
    """What is wrong with a model for the recipe of an evaluation, from its configuration and its tokenizer.

    Raises:
        HfkitError: if a template of the recipe is none.
    """
    try:
        config = load_config(place, recipe.trust_remote_code)
        if problem := _misfit(recipe.task, place, config):
            yield key, f"{place}: {problem}"
            return
        use: Any = "classify" if recipe.task == "classify" else "generate"
        tokenizer = load_tokenizer(place, use, recipe.chat_template)
        ids_of(tokenizer, config.get_text_config().vocab_size, place)
    except HfkitError as error:
        yield key, str(error)
        return
    if recipe.data is not None:
        yield from check_room(recipe, tokenizer, window_of(config, tokenizer), recipe.generation.get("max_new_tokens"))


def _misfit(task: str, place: str, config: "PretrainedConfig") -> str | None:
    """Why a model is not one for a task."""
    kind, has_classes = ", ".join(config.architectures or []), is_classifier(place, config)
    if task == "classify" and has_classes is False:
        what = "an adapter for texts" if is_adapter(place) else kind
        return f"has no head of classes, it is {what}; fine-tune it with `task: classify`"
    if task != "classify" and has_classes:
        return "is a classifier and writes no texts; choose `task: classify`, or another model"
    if task != "classify" and "ForMaskedLM" in kind:
        return f"is {kind}, which fills gaps and writes no texts; name a causal or seq2seq model"
    if task == "text" and config.is_encoder_decoder:
        return f"is {kind}, for which a text by itself has no likelihood; choose another task"
    return None


def of_rows(recipe: Any, rows: list[dict[str, Any]], models: dict[str, str]) -> Problems:
    """What is wrong with the rows: answers that are blank, where a metric needs them, and classes that a model lacks.

    Args:
        models: the places of those that are there, by their keys.
    """
    if recipe.task == "classify":
        for key, place in models.items():
            yield from ((key, f"{place}: {problem}") for problem in islice(_of_classes(recipe, rows, place), 1))
        return
    if recipe.task == "chat":
        for place in models.values():
            tokenizer = load_tokenizer(place, "generate", recipe.chat_template)
            yield from check_chats(recipe, rows, tokenizer, f"the {recipe.split} split")
    if recipe.task != "text" and any(each.needs_overlap for each in named(recipe.chosen)):
        yield from check_answers(recipe, rows, recipe.split)


def _of_classes(recipe: Any, rows: list[dict[str, Any]], place: str) -> Iterator[str]:
    """What is wrong with the classes of rows for the classifier at `place`."""
    config = load_config(place, recipe.trust_remote_code)
    known = config.id2label.values()
    for number, row in enumerate(rows, 1):
        where = f"row {number} of the {recipe.split} split"
        if isinstance(row[recipe.label], list) and not of_config.is_multi_label(config):
            yield f"chooses one class, and {where} has a list of them; fine-tune a model on rows with lists"
        for name in classes_of(recipe, row):
            if name not in known:
                yield f"has no class {shown(name)} of {where}, {did_you_mean(name, known)}"
