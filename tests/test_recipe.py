"""The recipe reader and the typed recipe."""

import json
from pathlib import Path

import pytest

from hfkit.engine import graph, reference, schema
from hfkit.errors import HfkitError
from hfkit.recipe import yaml_source
from hfkit.recipe.fields import Section, marked
from hfkit.recipe.validation import validate
from hfkit.stages import pretrain

RECIPES = Path(__file__).parent.parent / "recipes"


def read(tmp_path: Path, text: str, *overrides: str) -> yaml_source.Source:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return yaml_source.read(path, overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("8E2", 800.0),
        (".5", 0.5),
        ("-3", -3),
        ("007", 7),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("[1, a]", [1, "a"]),
        ("{a: 1e2}", {"a": 100.0}),
    ],
)
def test_scalars_follow_the_core_schema(tmp_path: Path, text: str, value: object) -> None:
    found = read(tmp_path, f"stage: s\nx: {text}\n").values["x"]
    assert found == value and type(found) is type(value)
    assert read(tmp_path, "stage: s\nx: old\n", f"x={text}").values["x"] == value


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    source = read(tmp_path, "# comment\nstage: s\na:\n  b:\n    - 1\n    - c: 2\n", "a.d=3")
    assert source.origins[("a",)].endswith("x.yaml:3")
    assert source.origins[("a", "b", 1, "c")].endswith("x.yaml:6")
    assert source.origins[("a", "d")] == "command line"


def test_overrides_set_nested_keys_lists_and_new_sections(tmp_path: Path) -> None:
    source = read(tmp_path, "stage: s\nl: [1, {a: 2}]\n", "l.1.a=5", "new.deep.key=[x]", "l.0=null", "empty=")
    assert source.values["l"] == [None, {"a": 5}]
    assert source.values["new"] == {"deep": {"key": ["x"]}} and source.values["empty"] is None


def test_an_override_replaces_what_was_written(tmp_path: Path) -> None:
    source = read(tmp_path, "stage: s\na: {b: 1}\n", "a=7")
    assert source.values["a"] == 7 and ("a", "b") not in source.origins


def test_a_library_class_is_taken_as_it_is() -> None:
    """No field of TrainingArguments is declared again: the section has them all, but for those hfkit sets."""
    import dataclasses

    from transformers import TrainingArguments

    section = marked(pretrain.Recipe, Section)["train"]
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    known = set(schema.section_model(section).model_fields)
    assert known == fields - set(dict(section.reserved))


@pytest.mark.parametrize("value", ["cosine", "adamw_torch_fused", "steps"])
def test_enumerations_of_the_library_are_offered_by_value(value: str) -> None:
    section = marked(pretrain.Recipe, Section)["train"]
    assert f'"{value}"' in json.dumps(schema.section_model(section).model_json_schema())


@pytest.mark.parametrize("name", graph.stage_names())
def test_the_schemas_in_the_repository_are_current(name: str) -> None:
    """`hfkit schema` was run. What belongs to another version of a library than the one here is not compared."""
    written = json.loads((RECIPES / "schema" / f"{name}.json").read_text(encoding="utf-8"))
    current = schema.of_stage(name)
    for key in marked(graph.load_stage(name).Recipe, Section):
        if written["properties"][key]["description"] != current["properties"][key]["description"]:
            del written["properties"][key], current["properties"][key]
    assert written == current


def test_the_reference_is_made_from_the_schemas() -> None:
    page = (RECIPES.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == reference.page(RECIPES / "schema"), "run `hfkit schema --reference docs/recipes.md`"
    for name in graph.stage_names():
        assert f"## `stage: {name}`" in page


def test_the_schema_explains_the_keys() -> None:
    properties = schema.of_stage("pretrain")["properties"]
    assert "learning rate" in properties["train"]["properties"]["learning_rate"]["description"]
    assert "Width of the residual stream" in properties["model"]["properties"]["hidden_size"]["description"]
    assert properties["train"]["additionalProperties"] is False


def test_a_union_is_told_as_one_rule(tmp_path: Path) -> None:
    source = read(tmp_path, "stage: pretrain\ndata: d\ntokenizer: t\nmodel: {}\ntrain: {report_to: 3}\n")
    with pytest.raises(HfkitError, match=r"train.report_to: must be a string or must be a list, got 3"):
        validate(source, pretrain.Recipe)
