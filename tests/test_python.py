"""Recipes without YAML: the functions of `hfkit`, and the classes that they take."""

import contextlib
import doctest
import inspect
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import hfkit
from hfkit.engine import background, python
from hfkit.engine.graph import load_stage, stage_names
from hfkit.errors import HfkitError
from hfkit.inference import prompting
from hfkit.recipe.fields import Input, marked
from hfkit.recipe.plain import plain as plainly

STAGES = {"tokenizer": "train_tokenizer"}


def test_the_examples_of_the_docstrings_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, each on what those before it made. What a run tells is no part of an example."""
    run = python.runner.run

    def silently(*args: Any, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            run(*args, **kwargs)

    monkeypatch.setattr(python.runner, "run", silently)
    examples = [
        each
        for each in doctest.DocTestFinder().find(python)
        + doctest.DocTestFinder().find(background, "background")
        + doctest.DocTestFinder().find(prompting)
        if each.examples
    ]
    examples.sort(key=lambda each: (not each.name.startswith(python.__name__), each.lineno or 0))
    assert {each.name.rpartition(".")[2] for each in examples} >= {*map(function_of, stage_names()), "generate"}
    runner = doctest.DocTestRunner(verbose=False)
    for each in examples:
        runner.run(each)
        assert not runner.failures, f"the example of {each.name} fails"


def function_of(stage: str) -> str:
    return STAGES.get(stage, stage)


@pytest.mark.parametrize("stage", stage_names())
def test_each_stage_is_a_function_that_names_its_inputs(stage: str) -> None:
    function = getattr(hfkit, function_of(stage))
    recipe = load_stage(stage).Recipe
    needed = {name for name, field in recipe.model_fields.items() if field.is_required()} - {"stage"}
    assert needed <= {*inspect.signature(function).parameters}
    assert all(part in function.__doc__ for part in ("Args:", "Returns:", "Raises:", "Example:"))
    required_inputs = {*marked(recipe, Input)} & needed
    assert required_inputs <= {*inspect.signature(function).parameters}


@pytest.mark.parametrize(
    "value, plain",
    [
        (peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"]), {"r": 4, "target_modules": ["k_proj", "q_proj"]}),
        (transformers.GenerationConfig(max_new_tokens=3), {"max_new_tokens": 3}),
        ({"a": Path("b"), "c": (torch.bfloat16, None)}, {"a": "b", "c": ["bfloat16", None]}),
        (hfkit.Result(Path("runs/x"), {}), "runs/x"),
    ],
)  # fmt: skip
def test_an_object_of_a_library_is_what_it_says_itself(value: Any, plain: Any) -> None:
    assert plainly(value) == plain


def test_training_arguments_say_what_was_given() -> None:
    args = transformers.TrainingArguments("x", max_steps=3, learning_rate=0.1)
    assert plainly(args) == {"max_steps": 3, "learning_rate": 0.1}


def test_a_configuration_is_made_again_from_what_it_says() -> None:
    config = hfkit.HfkitConfig(hidden_size=48, num_attention_heads=4, rope_parameters={"rope_theta": 5e4})
    assert hfkit.HfkitConfig(**plainly(config)).to_dict() == config.to_dict()
    assert plainly(hfkit.HfkitConfig()) == {}


def test_mistakes_are_told_as_in_recipes(world: Path) -> None:
    with pytest.raises(HfkitError, match=r'runs/data: min_caracters: unknown key, did you mean "min_characters"'):
        hfkit.prepare("runs/data", [{"files": "texts.txt"}], min_caracters=3)
    assert not Path("runs/data").exists()


def test_what_is_there_is_not_made_again(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [{"files": "texts.txt", "document": "line"}]
    first = hfkit.prepare("runs/data", sources)
    capsys.readouterr()
    assert hfkit.prepare("runs/data", sources).metrics == first.metrics
    assert "runs/data is up to date" in capsys.readouterr().out
    with pytest.raises(HfkitError, match="was made from a different recipe"):
        hfkit.prepare("runs/data", sources, min_characters=40)
    changed = hfkit.prepare("runs/data", sources, min_characters=40, rebuild=True)
    assert changed.metrics["rows"] < first.metrics["rows"]
