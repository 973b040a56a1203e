"""JSON schemas of the recipes, for completion, help and checks in an editor."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfkit.artifacts.manifest import Json
from hfkit.engine import graph, reference
from hfkit.recipe.fields import Input, Section, marked
from hfkit.recipe.validation import section_model


def of_stage(name: str) -> Json:
    """Return the schema of a stage's recipe. The sections are those of the installed libraries, whose versions it
    names."""
    recipe_class = graph.load_stage(name).Recipe
    schema: dict[str, Any] = recipe_class.model_json_schema()
    schema["title"] = f"hfkit recipe: {name}"
    schema["properties"]["stage"] = {"const": name, "description": "Which stage runs this recipe."}
    for key, section in marked(recipe_class, Section).items():
        library = section.target.split(".")[0]
        kinds = [section, *(section.of({section.chosen_by: value}) for value, _ in section.variants)]
        models = [section_model(kind).model_json_schema() for kind in kinds if kind.target]
        fields = models[0] if len(models) == 1 else {"anyOf": models}
        value = {"anyOf": [{"type": "string"}, fields]} if key in marked(recipe_class, Input) else fields
        description = f"Arguments of {section.target} ({library} {version(library)})."
        schema["properties"][key] = {**value, "description": description}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write(folder: Path, page: Path | None = None) -> None:
    """Write `<stage>.json` for every stage into `folder`, and a page of all keys."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in graph.stage_names():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(of_stage(name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(reference.page(folder), encoding="utf-8")
        print(f"wrote {page}")
