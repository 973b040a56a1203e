"""What a recipe is made of: typed keys, inputs, and sections that are the arguments of a class."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json

CLOSED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

Arguments = dict[str, Any]  # of a library's class, as a section of a recipe gives them


class RecipePart(BaseModel):
    """A mapping inside a recipe: closed, and strict about types."""

    model_config = CLOSED


class StageRecipe(RecipePart):
    """What the recipe of every stage has. A stage's `Recipe` adds its own keys.

    Attributes:
        MAKES: the kind of its result: data set, tokenizer, model or evaluation.
        DISTRIBUTED: whether all processes of a launcher work on it, or one alone.
        SUMMARY: what the result is, in a sentence, for its card.
        ENDS: whether it makes a folder and is done. One that does not runs until it is stopped.
    """

    MAKES: ClassVar[str]
    DISTRIBUTED: ClassVar[bool]
    SUMMARY: ClassVar[str]
    ENDS: ClassVar[bool] = True

    stage: str
    output_dir: str | None = pydantic.Field(
        default=None, min_length=1, description="Folder of the result. By default runs/<name of the recipe file>."
    )

    def external_inputs(self) -> Json:
        """Return what the result also depends on, beside the recipe and its inputs: by name, what identifies its
        content."""
        return {}


class Push(RecipePart):
    """A repository on the Hub that the finished folder goes to. The token comes from the environment."""

    repo: str = pydantic.Field(description="Its id, `name` or `organization/name`. It is made if it is not there.")
    private: bool = pydantic.Field(False, description="Make a new repository that others cannot see.")
    revision: str | None = pydantic.Field(None, min_length=1, description="A branch. By default the main one.")

    @pydantic.field_validator("repo")
    @classmethod
    def _valid_id(cls, repo: str) -> str:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ValueError(str(error)) from None
        return repo


@dataclasses.dataclass(frozen=True)
class ResolvedInput:
    """An input of a recipe.

    Attributes:
        path: of a folder, or an id on the Hub.
        recipe: what makes the folder, if a recipe does.
    """

    path: str
    recipe: StageRecipe | None = None

    @property
    def exists(self) -> bool:
        """Whether it is a folder to look at: where a recipe makes it, a finished one, by the recipe as it is now."""
        if self.recipe is None:
            return Path(self.path).is_dir()
        content = manifest.read_json(Path(self.path))
        if content is None:
            return False
        now = json.loads(self.recipe.model_dump_json(exclude={"push"}))
        return all(content["recipe"][key] == now[key] for key in content["recipe"].keys() & now.keys())


ResolvedInputs = dict[str, ResolvedInput]  # by the keys of a recipe, those of a list as `models.0`, `models.1` ...


AnyRecipe = TypeVar("AnyRecipe", bound=StageRecipe)


@dataclasses.dataclass(frozen=True)
class Input:
    """Marks a key whose value is another recipe (`*.yaml`), a folder, or an id on the Hub."""

    kind: Literal["data set", "tokenizer", "model"]


@dataclasses.dataclass(frozen=True)
class Section:
    """Marks a key whose value is the keyword arguments of a library class, named by its dotted path.

    hfkit re-declares none of the fields: they are read from the installed class when a recipe is checked.
    `reserved` are the fields that hfkit sets itself, each with the reason; `parts` are hfkit's own keys beside them.
    `variants` are the classes that it is instead for some values of the recipe's key `chosen_by`; an empty name leaves
    the arguments to the stage to check.
    """

    target: str
    reserved: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, type[RecipePart]], ...] = ()
    chosen_by: str = ""
    variants: tuple[tuple[str, str], ...] = ()

    def of(self, values: Arguments) -> "Section":
        """Return the section of a recipe with these values."""
        target = dict(self.variants).get(str(values.get(self.chosen_by)), self.target)
        return dataclasses.replace(self, target=target)

    def load_class(self) -> type:
        module, name = self.target.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def marked(recipe_class: type[StageRecipe], marker: type) -> dict[str, Any]:
    """Return the keys of a recipe that carry a marker (`Input`, `Section`), each with its marker."""
    return {
        name: item
        for name, field in recipe_class.model_fields.items()
        for item in field.metadata
        if isinstance(item, marker)
    }
