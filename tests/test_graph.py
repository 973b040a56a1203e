"""The graph of recipes, the states of a folder, and that nothing finished is lost."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.engine import graph, states
from hfkit.errors import HfkitError

TOKENIZER = Path("recipes/tokenizer.yaml")


def replace(path: str, old: str, new: str) -> None:
    text = Path(path).read_text(encoding="utf-8")
    assert old in text
    Path(path).write_text(text.replace(old, new), encoding="utf-8")


def todo(path: Path = TOKENIZER, *overrides: str) -> list[str]:
    return list(states.what_runs(graph.resolve(path, overrides)))


def test_what_a_recipe_needs_runs_first_and_once(world: Path) -> None:
    node = graph.resolve(Path("recipes/pretrain.yaml"))
    assert [each.recipe.stage for each in graph.in_order(node)] == ["prepare", "tokenizer", "pretrain"]
    assert todo(Path("recipes/pretrain.yaml")) == ["runs/data", "runs/tokenizer", "runs/pretrain"]


def test_a_finished_recipe_is_up_to_date(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    assert cli.main(["run", str(TOKENIZER)]) == 0
    assert "runs/tokenizer is up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_folder_can_be_an_input_too(ready: Path) -> None:
    assert todo(TOKENIZER, "data=runs/data") == []


def test_an_input_that_is_gone_is_only_made_again_when_it_is_needed(ready: Path) -> None:
    Path("runs/data").rename("elsewhere")
    assert todo() == []
    assert todo(TOKENIZER, "output_dir=runs/other") == ["runs/data", "runs/other"]


@pytest.mark.parametrize("option", [[], ["output_dir=runs/tokenizer"]])
def test_a_changed_recipe_is_refused_with_the_differences_and_the_ways_on(
    ready: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    content = Path("runs/tokenizer/tokenizer.json").read_bytes()
    assert cli.main(["run", str(TOKENIZER), "vocab_size=300", *option]) == 2
    message = capsys.readouterr().err
    assert "vocab_size: 320 -> 300" in message
    assert "output_dir=..." in message and "--rebuild" in message and "runs/tokenizer.old1" in message
    assert Path("runs/tokenizer/tokenizer.json").read_bytes() == content


def test_a_changed_input_is_refused_with_its_differences(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace("recipes/data.yaml", "test: 0.1", "test: 0.2")
    assert cli.main(["run", str(TOKENIZER)]) == 2
    message = capsys.readouterr().err
    assert "runs/data: was made from a different recipe" in message
    assert "split.test: 0.1 -> 0.2" in message and "=runs/data" in message


def test_a_changed_source_file_is_noticed(ready: Path) -> None:
    with Path("texts.txt").open("a", encoding="utf-8") as file:
        file.write("one more line\n")
    with pytest.raises(HfkitError, match="texts.txt"):
        todo(Path("recipes/data.yaml"))


def test_an_input_that_was_made_again_with_other_content_is_noticed(ready: Path) -> None:
    entry = json.loads(Path("runs/data/hfkit.json").read_text(encoding="utf-8"))
    Path("runs/data/hfkit.json").write_text(json.dumps({**entry, "digest": "0" * 64}), encoding="utf-8")
    with pytest.raises(HfkitError, match="data: the content of runs/data has changed"):
        todo()


def test_a_file_cut_short_is_noticed(ready: Path) -> None:
    path = Path("runs/data/train.parquet")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HfkitError, match=r"train.parquet: has \d+ bytes, hfkit.json says \d+; restore it"):
        todo(Path("recipes/data.yaml"))


def test_rebuild_keeps_the_old_result_aside(ready: Path) -> None:
    old = Path("runs/tokenizer/tokenizer.json").read_bytes()
    assert cli.main(["run", str(TOKENIZER), "vocab_size=300", "--rebuild"]) == 0
    assert Path("runs/tokenizer.old1/tokenizer.json").read_bytes() == old
    assert json.loads(Path("runs/tokenizer/hfkit.json").read_text(encoding="utf-8"))["recipe"]["vocab_size"] == 300
    assert cli.main(["run", str(TOKENIZER), "--rebuild"]) == 0
    assert Path("runs/tokenizer.old2").is_dir() and Path("runs/data.old1").exists() is False


def test_a_result_appears_whole_or_not_at_all(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("pulled the plug")

    monkeypatch.setattr("hfkit.engine.runner.write_card", fail)
    with pytest.raises(RuntimeError):
        cli.main(["run", "recipes/data.yaml"])
    assert [path.name for path in Path("runs").iterdir() if not path.name.endswith(".lock")] == []
    monkeypatch.undo()
    monkeypatch.chdir(world)
    assert cli.main(["run", "recipes/data.yaml"]) == 0


def test_a_kill_leaves_nothing_half_made(world: Path) -> None:
    """A process killed while it prepares leaves no `runs/data`; the next run makes it."""
    code = (
        "import time; from hfkit import cli; from hfkit.engine import runner; "
        "runner.write_card = lambda *_: time.sleep(60); cli.main(['run', 'recipes/data.yaml'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("dropped" in line for line in process.stdout)
    process.kill()
    process.wait()
    assert not Path("runs/data").exists()
    assert cli.main(["run", "recipes/data.yaml"]) == 0


def test_two_runs_into_one_folder_cannot_mix(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with manifest.locked(Path("runs/other")):
        command = [sys.executable, "-m", "hfkit", "run", str(TOKENIZER), "output_dir=runs/other"]
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert "runs/other: another run is writing this folder" in second.stderr
    assert not Path("runs/other").exists()


def test_the_manifest_says_what_made_the_folder(ready: Path) -> None:
    made = json.loads(Path("runs/tokenizer/hfkit.json").read_text(encoding="utf-8"))
    data = json.loads(Path("runs/data/hfkit.json").read_text(encoding="utf-8"))
    assert made["stage"] == "tokenizer" and made["recipe"]["vocab_size"] == 320
    assert made["inputs"]["data"]["digest"] == data["digest"]
    assert set(made["files"]) >= {"tokenizer.json", "tokenizer_config.json", "README.md", "metrics.json"}
    assert made["files"]["tokenizer.json"]["sha256"] == manifest.sha256_of(Path("runs/tokenizer/tokenizer.json"))
    assert made["versions"]["python"] and made["seconds"] >= 0 and made["metrics"]["vocab_size"] == 320


def test_the_digest_is_that_of_the_content(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe makes the same digest again, although times differ."""
    time.sleep(0.01)
    assert cli.main(["run", str(TOKENIZER), "output_dir=runs/again"]) == 0
    digests = {json.loads(Path(f"runs/{name}/hfkit.json").read_text())["digest"] for name in ("tokenizer", "again")}
    assert len(digests) == 1


def test_output_that_nobody_reads_to_its_end_is_no_fault_of_the_disk(world: Path) -> None:
    command = f"{sys.executable} -m hfkit plan recipes/data.yaml | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.split()[-1] in ("0", "141") and done.stderr == ""


def test_plan_checks_everything_and_changes_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "recipes/pretrain.yaml", "train.max_steps=10"]) == 0
    shown = capsys.readouterr().out
    assert "will run" in shown and "max_steps: 10" in shown
    assert "tokens          1,280 in 10 steps of 128" in shown and "parameters" in shown
    assert [path.name for path in Path("runs").iterdir()] == [".cache"]  # where a plan is kept for the card


def test_a_path_from_the_home_folder_is_one_in_every_place(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = world / "home"
    home.mkdir()
    (world / "texts.txt").rename(home / "texts.txt")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))  # as it is called on Windows
    assert cli.main(["run", "recipes/data.yaml", "sources.0.files=~/texts.txt", "output_dir=~/data"]) == 0
    assert cli.main(["run", "recipes/tokenizer.yaml", "data=~/data", "output_dir=~/tokenizer"]) == 0
    assert (home / "data" / "train.parquet").is_file() and (home / "tokenizer" / "tokenizer.json").is_file()
    assert not (world / "~").exists()
