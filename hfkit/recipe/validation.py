"""YAML values -> typed recipe, with every mistake told at once: file, line, value, rule and remedy."""

import dataclasses
import enum
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pydantic
from pydantic import BaseModel

from hfkit.errors import HfkitError, did_you_mean, shown
from hfkit.recipe.fields import CLOSED, AnyRecipe, Section, marked
from hfkit.recipe.yaml_source import Key, Source


def validate(source: Source, recipe_class: type[AnyRecipe]) -> AnyRecipe:
    """Return the typed recipe.

    Raises:
        HfkitError: with every mistake of the file and of the command line.
    """
    recipe, problems = parse(source, recipe_class)
    problems += section_problems(source, recipe_class)
    if problems or recipe is None:
        raise HfkitError(*dict.fromkeys(problems))
    return recipe


def parse(source: Source, recipe_class: type[AnyRecipe]) -> tuple[AnyRecipe | None, list[str]]:
    """Return the typed recipe without a look at its sections, which takes their libraries; and its mistakes."""
    problems = list(source.problems)
    try:
        return recipe_class.model_validate(source.values), problems
    except pydantic.ValidationError as error:
        return None, problems + _explain(error, recipe_class, source, ())


def section_problems(source: Source, recipe_class: type[AnyRecipe]) -> list[str]:
    """Return what the sections' own classes, which this imports, find wrong with them."""
    problems: list[str] = []
    for name, section in marked(recipe_class, Section).items():
        section = section.of(source.values)
        if isinstance(source.values.get(name), dict) and section.target:
            problems += _section_problems(section, name, source)
    return problems


# ---- sections: the library's own classes


@functools.cache
def section_model(section: Section) -> type[BaseModel]:
    """Return a closed pydantic model of the arguments of the section's class."""
    cls = section.load_class()
    help_texts, reserved = _argument_help(cls), dict(section.reserved)
    fields: dict[str, Any] = {}
    for name, hint, default in _arguments(cls):
        if name not in reserved:
            default = default.value if isinstance(default, enum.Enum) else default
            default = default if isinstance(default, int | float | str) else None
            fields[name] = (_plain(hint) | None, pydantic.Field(default, description=help_texts.get(name)))
    fields |= {name: (part | None, pydantic.Field(None, description=part.__doc__)) for name, part in section.parts}
    return pydantic.create_model(cls.__name__, __config__=CLOSED, **fields)


def _arguments(cls: type) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and default of each argument: of a dataclass's fields, else as the docstring tells the
    types."""
    own = inspect.get_annotations(cls) if dataclasses.is_dataclass(cls) else {}
    if own:
        hints = inspect.get_annotations(cls, eval_str=True)
        yield from (
            (field.name, hints[field.name], field.default)
            for field in dataclasses.fields(cls)
            if field.init and field.name in own
        )
        return
    parameters = inspect.signature(cls).parameters
    is_whole = all(
        parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters.values()
    )
    named = dict.fromkeys(name for name in (vars(cls()) if is_whole else ()) if not name.startswith("_"))
    for name, parameter in parameters.items():
        named |= {name: parameter.default} if parameter.kind is not inspect.Parameter.VAR_KEYWORD else {}
    for name, default in named.items():
        match = re.search(rf"^\s+{name} \(`(\w+)`(?! ?or)", cls.__doc__ or "", re.MULTILINE)
        yield name, {"int": int, "float": float, "bool": bool, "str": str}.get(match[1] if match else ""), default


def _section_problems(section: Section, name: str, source: Source) -> list[str]:
    """Return reserved and unknown keys and wrong types; where there are none, what the class itself refuses."""
    reserved = dict(section.reserved)
    values = {key: value for key, value in source.values[name].items() if key not in reserved}
    problems = [
        source.problem((name, key), f"is set by hfkit: {reason}; delete the key")
        for key, reason in reserved.items()
        if key in source.values[name]
    ]
    model = section_model(section)
    try:
        model.model_validate(values)
    except pydantic.ValidationError as error:
        return problems + _explain(error, model, source, (name,))
    try:
        section.load_class()(**{key: value for key, value in values.items() if key not in dict(section.parts)})
    except ImportError:  # of a package that the class is for: the stage tells how to get it
        pass
    except Exception as error:  # whatever a class says against its own arguments is the user's to read
        message = str(error.__cause__ or error).strip().splitlines()[-1]
        named = re.match(r"(\w+)=", message)
        problems.append(source.problem((name, named[1]) if named else (name,), message))
    return problems


def _plain(hint: object) -> Any:
    """Return a type hint in terms that YAML can hold: an enumeration by its values, a class as a mapping, None for
    any."""
    if hint is None:
        return bool | int | float | str | list[Any] | dict[str, Any]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Literal[tuple(member.value for member in hint)]
    if typing.get_origin(hint) is Literal and any("[" in str(member) for member in typing.get_args(hint)):
        return str  # one of the words stands for a family, such as pissa_niter_[number of iters]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
        if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members):
            members = tuple(member for member in members if member is not str)
        members = tuple(sorted(members, key=str))  # typing orders equal unions like the first that was written
        return functools.reduce(lambda left, right: left | right, map(_plain, members))
    if typing.get_origin(hint) in (list, dict, Literal) or hint in (int, float, str, bool, list, dict, type(None)):
        return hint
    return dict[str, Any]


def _argument_help(cls: type) -> dict[str, str]:
    """Return the description of each argument, from a docstring in the style of transformers."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in (cls.__doc__ or "").splitlines():
        header = re.match(r"\s+([a-z]\w*(?:, [a-z]\w*)*) \(`.*?\):?(.*)", line)
        if header:
            names = header[1].split(", ")
            texts.update(dict.fromkeys(names, header[2].strip(" :")))
        elif line.strip():
            texts.update({name: f"{texts[name]} {line.strip()}".strip() for name in names})
        else:
            names = []
    return texts


# ---- pydantic's errors in our words

_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}


def _explain(error: pydantic.ValidationError, model: type[BaseModel], source: Source, prefix: Key) -> list[str]:
    """Return one message a key; the branches of a union are told as one rule."""
    messages: dict[Key, list[str]] = {}
    for item in error.errors():
        location, kind, context = prefix + item["loc"], item["type"], item.get("ctx", {})
        key = location if kind == "missing" else source.existing(location)
        if kind == "extra_forbidden":
            message = f"unknown key, {did_you_mean(str(key[-1]), _known_keys(model, key[len(prefix) : -1]))}"
        elif kind == "missing":
            message = "is missing; the recipe must give it"
        elif kind == "value_error":
            message = str(context["error"])
            named = re.match(r"([\w.]+)=", message)
            if named and not key:
                key = source.existing(tuple(named[1].split(".")))
        elif kind == "literal_error":
            value, expected = source.get(key), re.findall(r"'([^']*)'", context["expected"])
            hint = f", {did_you_mean(value, expected)}" if isinstance(value, str) else ""
            message = f"must be one of {', '.join(expected)}, got {shown(value)}{hint}"
        else:
            rule = _RULES.get(kind, item["msg"]).format(**context)
            message = f"{rule}, got {shown(source.get(key))}"
            if kind == "string_type" and source.origins.get(key) == "command line":
                message += f"; quote it so that it is text: {'.'.join(map(str, key))}='\"...\"'"
        messages.setdefault(key, []).append(message)
    return [source.problem(key, _join(texts)) for key, texts in messages.items()]


def _join(texts: list[str]) -> str:
    """Return several rules for one value as one: `must be a list or must be a string, got 3`."""
    rules = list(dict.fromkeys(texts))
    return " or ".join([rule.split(", got ")[0] for rule in rules[:-1]] + rules[-1:])


def _known_keys(model: type[BaseModel], path: Key) -> set[str]:
    """Return the keys that may stand where `path` leads."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, str) and current is not None:
            current = _model_inside(current.model_fields[part].annotation)
    return set(current.model_fields) if current is not None else set()


def _model_inside(annotation: object) -> type[BaseModel] | None:
    """Return the first pydantic model in a type hint."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_inside, typing.get_args(annotation))), None)
