"""`hfkit new`: a project that runs as it is written."""

from pathlib import Path

import pytest

from hfkit import cli
from hfkit.engine import graph, new


@pytest.mark.parametrize("template", ["pretrain", "finetune", "distill", "compare"])
def test_a_project_holds_all_that_its_recipe_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine", "--template", template]) == 0
    assert f"cd mine && accelerate launch recipes/{template}.yaml" in capsys.readouterr().out
    monkeypatch.chdir("mine")
    nodes = list(graph.in_order(graph.resolve(Path(f"recipes/{template}.yaml"))))
    assert {node.source.path.name for node in nodes} == {path.name for path in Path("recipes").glob("*.yaml")}
    for path in Path("recipes").glob("*.yaml"):
        schema = path.read_text(encoding="utf-8").splitlines()[0].partition("$schema=")[2]
        assert (path.parent / schema).is_file()
    assert Path(".gitignore").read_text() == "runs/\n" and Path("data").is_dir()
    assert f"accelerate launch recipes/{template}.yaml" in Path("README.md").read_text(encoding="utf-8")


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert cli.main(["new", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert cli.main(["new", str(tmp_path / "x"), "--template", "pretrian"]) == 2
    assert 'there is no such recipe, did you mean "pretrain"' in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_recipes_are_found_beside_the_sources() -> None:
    assert (new._shipped() / "schema" / "pretrain.json").is_file()
