"""A data file where a data set is asked for; and what is said of inputs that are not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from hfkit import cli
from hfkit.data import corpus
from hfkit.data.guess import guess
from hfkit.data.tasks import TASKS
from hfkit.data.tasks.generate import Generate
from hfkit.engine import graph
from hfkit.errors import HfkitError
from hfkit.recipe import yaml_source
from tests.toy import TOKENIZER

ROWS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a?", "completion": "b"},
    "question": {"question": "a?", "answer": "b", "id": 7},
    "alpaca": {"instruction": "a?", "input": "c", "output": "b"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "classes": {"sentence": "a", "category": "x"},
    "content": {"content": "a"},
}


def write(path: Path, row: dict[str, Any], count: int = 60) -> Path:
    """Rows like `row` that differ in the number behind the first text of each."""
    first = next(iter(row))
    numbered = [{**row, first: f"{row[first]} {n}"} if isinstance(row[first], str) else row for n in range(count)]
    path.write_text("".join(json.dumps(each) + "\n" for each in numbered), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, task, columns, keys",
    [
        ("prompt", "generate", {"prompt": "text", "completion": "text"},
         {"prompt": "{prompt}", "completion": "{completion}"}),
        ("question", "generate", {"question": "text", "answer": "text"},
         {"prompt": "{question}", "completion": "{answer}"}),
        ("alpaca", "generate", {"instruction": "text", "input": "text", "output": "text"},
         {"prompt": "{instruction}\n{input}", "completion": "{output}"}),
        ("messages", "chat", {"messages": "messages"}, {"messages": "messages"}),
        ("sharegpt", "chat", {"conversations": "messages"}, {"messages": "conversations"}),
        ("classes", "classify", {"sentence": "text", "category": "label"},
         {"prompt": "{sentence}", "label": "category"}),
        ("content", "text", {"content": "text"}, {}),
    ],
)  # fmt: skip
def test_columns_are_known_by_their_usual_names(
    tmp_path: Path, name: str, task: str, columns: dict[str, str], keys: dict[str, str]
) -> None:
    found = guess(str(write(tmp_path / "rows.jsonl", ROWS[name])), TASKS[task], {})
    assert (found.columns, found.keys) == (columns, keys)


def test_what_the_recipe_names_is_taken(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", {"q": "a", "topic": "x", "answer": "b"}))
    found = guess(path, Generate, {"prompt": "On {topic}: {q}"})
    assert found.columns == {"topic": "text", "q": "text", "answer": "text"} and found.keys == {
        "completion": "{answer}"
    }
    with pytest.raises(HfkitError) as told:
        guess(path, TASKS["classify"], {})
    assert "no column is known to be the prompt" in str(told.value) and "topic: 'x'" in str(told.value)
    assert str(told.value).endswith("task: classify\n    prompt: '{<column>}'")


def test_a_file_is_prepared_once_and_trained_on(
    ready: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(ready / "pairs.jsonl", ROWS["question"])
    train = "{max_steps: 1, per_device_train_batch_size: 2, torch_compile: false, bf16: false, save_strategy: 'no'}"
    Path("evaluate.yaml").write_text(
        "stage: evaluate\nmodel: recipes/pretrain.yaml\ndata: pairs.jsonl\ntask: generate\nlimit: 2\n"
        "generation: {max_new_tokens: 2}\n", encoding="utf-8",
    )  # fmt: skip
    assert cli.main(["run", "recipes/pretrain.yaml", f"train={train}"]) == 0
    keys = ["run", "evaluate.yaml", "model=runs/pretrain"]
    assert cli.main(keys) == 0
    out = capsys.readouterr().out
    assert "pairs.jsonl: prompt is question, completion is answer" in out and "== prepare: pairs.jsonl" in out
    assert len(list(corpus.rows("runs/pairs.jsonl.question-answer", "train"))) > 40
    assert cli.main(keys) == 0 and "up to date" in capsys.readouterr().out
    write(ready / "pairs.jsonl", ROWS["question"], 61)
    assert cli.main(keys) == 2
    assert "pairs.jsonl: " in capsys.readouterr().err


def test_several_files_and_folders_are_inputs_too(ready: Path) -> None:
    (ready / "texts").mkdir()
    for name in "ab":
        write(ready / "texts" / f"{name}.jsonl", {"text": f"{name} cat"}, 40)
    Path("t.yaml").write_text(TOKENIZER, encoding="utf-8")
    for data in ("texts/*.jsonl", "texts"):
        node = graph.resolve(Path("t.yaml"), [f"data={data}"])
        (prepare,) = [each for each in graph.in_order(node) if each.recipe.stage == "prepare"]
        assert len(prepare.made_from["external"]) == 2 and prepare.output_dir.name.endswith(".text")


@pytest.mark.parametrize(
    "override, message",
    [
        ("data=none.jsonl", "none.jsonl: no such file"),
        ("data=recipes/dta", "recipes/dta: there is no such folder, known: data.yaml, "),
        ("tokenizer=./gone", "./gone: there is no such folder"),
        ("train.metric_for_best_model=bits_per_bite", 'of this training, did you mean "bits_per_byte"?'),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told(
    ready: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert cli.main(["plan", "recipes/pretrain.yaml", override]) == 2
    assert message in capsys.readouterr().err


def test_an_id_that_the_hub_does_not_give(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "recipes/pretrain.yaml", "tokenizer=someone/none"]) == 2
    error = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set: unset it, or `hf download someone/none` once before" in error
    assert "stage: tokenizer" not in error


@pytest.mark.parametrize(
    "text, value",
    [("{question}", "{question}"), ("{a} or {b} ->", "{a} or {b} ->"), ("{% if x %}", "{% if x %}"),
     ("{r: 8}", {"r": 8}),
     ("{}", {}), ("[1, 2]", [1, 2]), ("null", None), ("1e-3", 1e-3), ("a: b: c", "a: b: c")],
)  # fmt: skip
def test_a_template_on_the_command_line_is_text(tmp_path: Path, text: str, value: Any) -> None:
    (tmp_path / "a.yaml").write_text("stage: finetune\n", encoding="utf-8")
    assert yaml_source.read(tmp_path / "a.yaml", [f"prompt={text}"]).values["prompt"] == value


def test_a_changed_default_is_noticed_and_a_new_one_is_not(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("runs/data/hfkit.json")
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["recipe"].pop("repair") is True  # as if it were a new key
    path.write_text(json.dumps(made), encoding="utf-8")
    assert cli.main(["run", "recipes/data.yaml"]) == 0
    made["recipe"]["min_characters"] = 3
    path.write_text(json.dumps(made), encoding="utf-8")
    assert cli.main(["run", "recipes/data.yaml"]) == 2
    assert "min_characters: the default was 3, and is 1" in capsys.readouterr().err
