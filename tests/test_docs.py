"""The guides in docs/: their recipes are checked, and their commands run, on small data and for a few steps."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.engine import graph
from hfkit.hub import push

ROOT = Path(__file__).parent.parent
GUIDES = [*sorted((ROOT / "docs").glob("[0-9]-*.md")), ROOT / "README.md"]
CANARIES = {"HF_TOKEN": "hf_" + "canary" * 6, "WANDB_API_KEY": "wandb" * 8, "SOME_PASSWORD": "swordfish-swordfish"}
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "torch_compile": False, "bf16": False, "logging_steps": 1}
HALF = {"validation": 0.2, "test": 0.2}
# What makes a recipe of the repository small.
SMALL: dict[str, dict[str, Any]] = {
    "data": {"sources": [{"builtin": "python-stdlib", "limit": 25}], "split": HALF},
    "functions": {"sources": [{"builtin": "python-functions", "limit": 300}], "split": HALF},
    "packages": {"sources": [{"builtin": "python-packages", "limit": 1000}], "split": HALF},
    "tokenizer": {"vocab_size": 512},
    "pretrain": {
        "model": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
        "sequence_length": 64,
        "train": TRAIN,
        "prompts": [],
    },
    "finetune": {"sequence_length": 64, "prompt": "{code} ", "evaluation_rows": 2, "train": TRAIN},
    "classify": {"sequence_length": 64, "train": TRAIN},
    "distill": {"sequence_length": 64, "train": TRAIN},
    "prune": {"sequence_length": 64, "train": TRAIN, "calibration_rows": 4, "limit": 4, "accept": {}},
    "quantize": {"limit": 4, "accept": {}},
    "quantize-nf4": {"limit": 4, "accept": {}},
    "evaluate": {"limit": 4, "prompt": "{code} ", "generation": {"max_new_tokens": 4}},
    "compare": {"limit": 4},
}


def commands(guide: Path) -> list[str]:
    found = re.findall(r"^    \$ (.*)$", guide.read_text(encoding="utf-8"), re.M)
    return [each for each in found if "stesp" not in each]  # which shows a mistake


def recipes(guide: Path) -> dict[str, str]:
    """The recipes that a guide writes: a name in a line of its own, and an indented block."""
    found = re.findall(r"^`([a-z]+\.yaml)`:\n\n((?:    .*\n)+)", guide.read_text(encoding="utf-8"), re.M)
    return {name: re.sub(r"^    ", "", text, flags=re.M) for name, text in found}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes of the repository, made small, and the files that the guides speak of."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "accelerate_configs", folder / "accelerate_configs")
    (folder / "recipes").mkdir()
    for name, changes in SMALL.items():
        given = yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8"))
        (folder / f"recipes/{name}.yaml").write_text(yaml.safe_dump({**given, **changes}), encoding="utf-8")
    pairs = [{"question": f"what is {n} and {n}", "answer": str(2 * n)} for n in range(200)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs), encoding="utf-8")
    (folder / "support").mkdir()
    with (folder / "support/a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["Subject", "Reply"], *([f"how do I do {n}", f"so and {n}"] for n in range(100))])
    for guide in GUIDES:
        for name, text in recipes(guide).items():
            values = yaml.safe_load(text)
            values |= {"train": TRAIN, "sequence_length": 64, "evaluation_rows": 2} if "train" in values else {}
            (folder / name).write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


def serve(arguments: list[str]) -> None:
    """Start the server of a guide, run the line that it prints, and stop it."""
    command = [sys.executable, "-m", "hfkit", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.strip().startswith("try "))
        answer = subprocess.run(shlex.split(line)[1:], capture_output=True, text=True, timeout=60)
        process.terminate()
        process.communicate()
        assert json.loads(answer.stdout)["usage"]["total_tokens"] > 0
    assert process.returncode == 0


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_commands_of_a_guide_run(
    guide: Path,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """And no secret of the environment is in a file, in a line of output, or in what is pushed."""
    monkeypatch.chdir(small)
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(push, "try_out", lambda *asked: None)
    hub = request.getfixturevalue("hub")
    found = commands(guide)
    assert found
    for command in found:
        program, *arguments = shlex.split(command.replace("org/", "lab/"))
        if program == "accelerate":  # on hardware that is not here
            assert Path(arguments[2]).is_file() and graph.resolve(Path(arguments[3]))
            continue
        if arguments[0] in ("push", "lineage", "serve", "chat") and not Path(arguments[1]).is_dir():
            assert cli.main(["run", f"recipes/{Path(arguments[1]).name}.yaml"]) == 0
        if arguments[0] == "serve":
            serve(arguments)
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("a text\n"))
        few = [each for each in arguments if not each.startswith("train.max_steps")]
        if guide.name == "README.md" and arguments[0] == "run":
            few.append(f"output_dir=runs/readme-{Path(arguments[1]).stem}")
        assert cli.main(few) == 0, command
    for folder in small.glob("runs/*"):
        made = manifest.read_json(folder)
        if made is not None and guide.stem == "7-publish":
            assert cli.main(["push", str(folder), f"lab/{folder.name}"]) == (2 if made["makes"] == "evaluation" else 0)
    contents = [path.read_bytes() for path in small.rglob("*") if path.is_file()]
    contents += ["".join(capsys.readouterr()).encode(), hub.sent()]
    for secret in (*CANARIES.values(), os.environ["HF_TOKEN"]):
        assert not any(secret.encode() in content for content in contents)
    assert not list(small.rglob("training_args.bin")) and str(small).encode() not in hub.sent()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_names_keys_and_recipes_that_there_are(
    guide: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, with the sizes of the repository."""
    (small / "whole").mkdir(exist_ok=True)
    monkeypatch.chdir(small / "whole")
    for name in ("recipes", "accelerate_configs"):
        if not Path(name).exists():
            os.symlink(ROOT / name, name)
    shutil.copy(small / "pairs.jsonl", "pairs.jsonl")
    shutil.copytree(small / "support", "support", dirs_exist_ok=True)
    for name, text in recipes(guide).items():
        Path(name).write_text(text, encoding="utf-8")
        assert graph.resolve(Path(name))
    for command in commands(guide):
        program, *arguments = shlex.split(command)
        if program == "hfkit" and arguments[0] in ("run", "plan"):
            options = [each for each in arguments[2:] if "=" in each]
            assert graph.resolve(Path(arguments[1]), options)
