"""What an evaluation cannot be made of, told before a model is loaded: problems of the recipe's keys."""

from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from hfkit.artifacts.manifest import is_adapter
from hfkit.data.corpus import Row, read_split
from hfkit.data.tasks import Task
from hfkit.data.tasks.base import Problems
from hfkit.data.tasks.checks import check_answers, check_data, is_multi_label
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError, did_you_mean, shown
from hfkit.evaluation.settings import Scoring
from hfkit.inference import classes as of_config
from hfkit.metrics import scripts
from hfkit.metrics.catalogue import fitting, named, score_names
from hfkit.model.loading import is_classifier, load_config, window_of
from hfkit.model.vocabulary import ids_of
from hfkit.recipe import limits
from hfkit.recipe.fields import ResolvedInput, ResolvedInputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def of_scoring(scoring: Scoring, data: ResolvedInput | None, models: ResolvedInputs) -> Problems:
    """Yield what is wrong with how models are to be scored, as far as it can be told before they are loaded. Those
    that are not there yet are not looked at."""
    task = scoring.task
    for index, name in enumerate(scoring.metrics):
        if name not in (fit := fitting(task.measured_by)):
            yield f"metrics.{index}", f"{name} does not fit `task: {task.name}`; those that do: {', '.join(fit)}"
    yield from of_words(scoring.tokenize, scoring.metrics)
    problems = list(check_data(task, data)) if data is not None else []
    present = {key: model.path for key, model in models.items() if model.exists}
    for key, path in present.items() if not problems else ():
        problems += of_model(scoring, key, path)
    yield from problems
    if not problems and data is not None and data.exists:
        yield from of_rows(scoring, read_split(data.path, scoring.split, scoring.limit), present)


def of_smaller(
    scoring: Scoring, inputs: ResolvedInputs, accept: dict[str, str], own: Callable[[str], Problems]
) -> Problems:
    """Yield what is wrong with a stage that makes a model smaller and scores it beside what it was.

    Args:
        accept: limits on the result.
        own: what the stage itself has against a model, by its place.
    """
    yield from of_quality(scoring)
    if inputs["model"].exists:
        try:
            yield from own(inputs["model"].path)
        except HfkitError as error:
            yield "model", str(error)
            return
    yield from of_scoring(scoring, inputs["data"], {"model": inputs["model"]})
    names = measured(scoring, inputs["data"])
    yield from limits.problems(accept, names, names, "the model before")


def measured(scoring: Scoring, data: ResolvedInput) -> list[str]:
    """Return the names of what is measured of a model that is scored on data, which limits may be on."""
    return [*score_names(scoring.metrics, is_multi_label(scoring.task, data)), *limits.COSTS]


def refuse(scoring: Scoring, rows: list[Row], models: dict[str, str]) -> None:
    """Raise what is wrong with models and rows that are all there by now.

    Args:
        models: the place of each by its key.

    Raises:
        HfkitError: with every problem.
    """
    problems = [item for key, path in models.items() for item in of_model(scoring, key, path)]
    problems += of_rows(scoring, rows, models) if not problems else []
    if problems:
        raise HfkitError(*(f"{key}: {problem}" for key, problem in problems))


def of_quality(scoring: Scoring) -> Problems:
    """Yield what is wrong with metrics by which no model is better than another."""
    if not any(metric.quality for metric in named(scoring.metrics)):
        fit = named(fitting(scoring.task.measured_by))
        allowed = ", ".join(metric.name for metric in fit if metric.quality)
        yield "metrics", f"{', '.join(scoring.metrics)}: none says which model is better; add one of {allowed}"


def of_words(name: str, metrics: Collection[str]) -> Problems:
    """Yield what is wrong with how metrics are to cut words."""
    if name not in scripts.names():
        yield "tokenize", f"{shown(name)} is not known, {did_you_mean(name, scripts.names())}"
        return
    if name == "ascii" and "bleu" in metrics:
        yield "tokenize", "'ascii' is rouge_score's and not for bleu; use 'auto' or '13a', or leave bleu out"
    elif name != "auto" and any(metric.cuts_words for metric in named(metrics)):
        try:
            scripts.tokenizer(name)
        except HfkitError as error:
            yield "tokenize", str(error).removeprefix("tokenize: ")


def of_tokens(models: ResolvedInputs, key: str) -> Problems:
    """Yield what is wrong with a key that compares the perplexity of models, where their tokens are different."""
    present = [model.path for model in models.values() if model.exists]
    vocabularies = {path: load_tokenizer(path, "generate").get_vocab() for path in present}
    for path in present[1:]:
        if vocabularies[path] != vocabularies[present[0]]:
            rule = f"is per token, and {path} has other tokens than {present[0]}; use bits_per_byte"
            yield key, f"perplexity {rule}"
            return


def of_model(scoring: Scoring, key: str, path: str) -> Problems:
    """Yield what is wrong with a model for an evaluation, from its configuration and its tokenizer.

    Raises:
        HfkitError: if a template of the task is none.
    """
    task = scoring.task
    try:
        config = load_config(path, scoring.trust_remote_code)
        if problem := _misfit(task, path, config):
            yield key, f"{path}: {problem}"
            return
        tokenizer = load_tokenizer(path, task.tokenizer_use, task.chat_template)
        ids_of(tokenizer, config.get_text_config().vocab_size, path)
    except HfkitError as error:
        yield key, str(error)
        return
    if scoring.metrics:
        window, new_tokens = window_of(config, tokenizer), scoring.generation.get("max_new_tokens")
        yield from task.room_problems(tokenizer, window, new_tokens)


def _misfit(task: Task, path: str, config: "PretrainedConfig") -> str | None:
    """Return why a model is not one for a task."""
    kind, has_classes = ", ".join(config.architectures or []), is_classifier(path, config)
    if task.has_classes and has_classes is False:
        kind_text = "an adapter for texts" if is_adapter(path) else kind
        return f"has no head of classes, it is {kind_text}; fine-tune it with `task: classify`"
    if not task.has_classes and has_classes:
        return "is a classifier and writes no texts; choose `task: classify`, or another model"
    if not task.has_classes and "ForMaskedLM" in kind:
        return f"is {kind}, which fills gaps and writes no texts; name a causal or seq2seq model"
    if task.is_text and config.is_encoder_decoder:
        return f"is {kind}, for which a text by itself has no likelihood; choose another task"
    return None


def of_rows(scoring: Scoring, rows: list[Row], models: dict[str, str]) -> Problems:
    """Yield what is wrong with the rows: answers that are blank, where a metric needs them, and classes that a model
    lacks.

    Args:
        models: the places of those that are there, by their keys.
    """
    task = scoring.task
    if task.has_classes:
        for key, path in models.items():
            yield from ((key, f"{path}: {problem}") for problem in islice(_of_classes(scoring, rows, path), 1))
        return
    if task.is_chat:
        for path in models.values():
            tokenizer = load_tokenizer(path, task.tokenizer_use, task.chat_template)
            yield from task.row_problems(rows, tokenizer, f"the {scoring.split} split")
    if task.has_answers and any(metric.needs_overlap for metric in named(scoring.metrics)):
        yield from check_answers(task, rows, scoring.split)


def _of_classes(scoring: Scoring, rows: list[Row], path: str) -> Iterator[str]:
    """Yield what is wrong with the classes of rows for the classifier at `path`."""
    config = load_config(path, scoring.trust_remote_code)
    classes = config.id2label.values()
    for number, row in enumerate(rows, 1):
        where = f"row {number} of the {scoring.split} split"
        if isinstance(row[scoring.task.label], list) and not of_config.is_multi_label(config):
            yield f"chooses one class, and {where} has a list of them; fine-tune a model on rows with lists"
        for name in scoring.task.references(row):
            if name not in classes:
                yield f"has no class {shown(name)} of {where}, {did_you_mean(name, classes)}"
