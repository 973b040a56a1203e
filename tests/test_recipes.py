"""Every recipe in the repository is loaded, checked and run for two real steps; every command of the README works."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from hfkit import cli
from hfkit.engine import graph, states
from hfkit.hub import push
from tests.toy import WORDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CANARIES = {"HF_TOKEN": "hf_" + "canary" * 6, "WANDB_API_KEY": "wandb" * 8, "SOME_PASSWORD": "swordfish-swordfish"}
SHORT = ["train.max_steps=2", "train.torch_compile=false", "train.logging_steps=1", "train.save_strategy=no"]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_recipe_fits_on_a_screen_and_is_checked(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 5 <= len(lines) <= 45
    schema = re.match(r"# yaml-language-server: \$schema=(.*)", lines[0])
    stage = yaml.safe_load("\n".join(lines))["stage"]
    assert schema and (path.parent / schema[1]).resolve() == ROOT / "recipes" / "schema" / f"{stage}.json"
    assert set(states.what_runs(graph.resolve(path)).values()) == {"absent"}


def test_the_plan_that_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = next(line for line in commands() if line.startswith("hfkit plan recipes/compare.yaml"))
    assert cli.main(shlex.split(line.replace("recipes/", f"{ROOT}/recipes/"))[1:]) == 0
    shown = capsys.readouterr().out
    assert "8 x h100" in shown and "Everything was checked; nothing was run." in shown and not Path("runs").exists()


def test_the_main_job_runs_from_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """The embedded corpus, the tokenizer and the model, as a new user gets them, but for the number of steps."""
    monkeypatch.chdir(tmp_path)
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    recipe = str(ROOT / "recipes" / "pretrain.yaml")
    assert cli.main(["run", recipe, *SHORT]) == 0
    data = json.loads(Path("runs/data/metrics.json").read_text(encoding="utf-8"))
    assert data["bytes"] > 5_000_000 and data["splits"]["test"]["rows"] >= 10
    tokenizer = json.loads(Path("runs/tokenizer/metrics.json").read_text(encoding="utf-8"))
    assert tokenizer["exact_round_trip"] == 1.0 and tokenizer["vocab_size"] == 4096
    metrics = json.loads(Path("runs/pretrain/metrics.json").read_text(encoding="utf-8"))
    assert 0 < metrics["bits_per_byte"] < 8 and metrics["parameters"] > 1_000_000
    assert cli.main(["run", recipe, *SHORT]) == 0
    shown = capsys.readouterr()
    assert "runs/pretrain is up to date" in shown.out

    # The secrets of the environment are in no file, no line of output, and nothing that is pushed.
    monkeypatch.setattr(push, "try_out", lambda *asked: None)
    hub = request.getfixturevalue("hub")
    line = next(line for line in commands() if line.startswith("hfkit push"))
    assert cli.main(shlex.split(line.replace("org/", "lab/"))[1:]) == 0 and hub.repo("lab/name").private
    assert all(cli.main(["push", f"runs/{name}", f"lab/{name}"]) == 0 for name in ("data", "tokenizer"))
    assert len(hub.state.repos) == 3
    found = [path.read_bytes() for path in Path().rglob("*") if path.is_file()]
    found += ["".join((*shown, *capsys.readouterr())).encode(), hub.sent()]
    for secret in (*CANARIES.values(), os.environ["HF_TOKEN"]):
        assert not any(secret.encode() in content for content in found)
    assert not list(Path().rglob("training_args.bin")) and str(tmp_path).encode() not in hub.sent()


def test_the_gpt2_chain_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three recipes, with the Hub's data set and the model's size replaced by small ones."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes" / "gpt2-124m", "recipes")
    Path("web").mkdir()
    texts = [f"{number} {' '.join(WORDS)}" for number in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "web/part.parquet")
    splits = ["split.validation=0.05", "split.test=0.05"]
    assert cli.main(["run", "recipes/data.yaml", "sources.0.hub=web", "sources.0.name=null", *splits]) == 0
    data = "data=runs/gpt2-124m/data"
    assert cli.main(["run", "recipes/tokenizer.yaml", data, "vocab_size=300"]) == 0
    small = ["model.hidden_size=48", "model.num_hidden_layers=1", "sequence_length=64"]
    small += ["attn_implementation=sdpa", "train.per_device_train_batch_size=2", "train.dataloader_num_workers=0"]
    tokenizer = "tokenizer=runs/gpt2-124m/tokenizer"
    assert cli.main(["run", "recipes/pretrain.yaml", data, tokenizer, *small, *SHORT]) == 0
    assert Path("runs/gpt2-124m/pretrain/model.safetensors").exists()


# ---- README


def commands() -> list[str]:
    return [line[4:].lstrip("$ ") for line in README.splitlines() if re.match(r"    (\$ |pip install)", line)]


def test_the_two_commands_are_there_and_run_in_ci() -> None:
    assert "pip install -e . && accelerate launch recipes/pretrain.yaml" in commands()
    assert 'pip install -e ".[test]" && pytest' in commands()
    assert "grep -m1 '&& pytest$' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_mistake_that_the_readme_shows_is_what_one_gets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    shown = next(line for line in commands() if line.startswith("hfkit plan"))
    answer = README.split(shown + "\n")[1].splitlines()[0].strip()
    assert cli.main(shlex.split(shown)[1:]) == 2
    assert capsys.readouterr().err.strip() == answer


def test_the_python_that_the_readme_shows_runs(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=1"]) == 0
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        assert capsys.readouterr().out.startswith("def main():")


def test_every_file_that_the_readme_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    tree = README.split("## Where things are")[1].split("**Read these first")[0]
    folder = ROOT
    for line in tree.splitlines():
        entry = re.match(r"    (  )?([\w./]+(, [\w./]+)*)( |$)", line)
        for name in entry[2].split(", ") if entry else []:
            folder = folder if entry and entry[1] else ROOT / name
            assert (folder / name if entry and entry[1] else ROOT / name).exists(), name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
