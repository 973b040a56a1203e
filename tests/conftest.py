"""Shared fixtures: everything is offline, and made on the spot."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hub_double import hub  # noqa: F401
from tests.kit import inside
from tests.toy import write_world

if TYPE_CHECKING:
    from hfkit.serving.server import Server

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Two workers run the tests: a process has one thread, which sleeps where it waits, and their torchruns meet at ports
# of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
os.environ["PET_MASTER_PORT"] = str(29510 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a toy corpus and its recipes, as the working directory."""
    monkeypatch.chdir(write_world(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world in which data and tokenizer are made already. To be read, not changed."""
    from hfkit import cli

    folder = write_world(tmp_path_factory.mktemp("made"))
    with inside(folder):
        assert cli.main(["run", "recipes/tokenizer.yaml"]) == 0
    return folder


@pytest.fixture
def ready(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a world in which data and tokenizer are made, as the working directory."""
    folder = tmp_path / "world"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a pretrained model of 64 wide, and the tasks of test_finetune.py. To be read, not changed."""
    from hfkit import cli
    from tests.test_finetune import write_tasks

    folder = tmp_path_factory.mktemp("finetune") / "world"
    shutil.copytree(made, folder)
    write_tasks(folder)
    with inside(folder):
        text = Path("recipes/pretrain.yaml").read_text().replace("hidden_size: 32", "hidden_size: 64")
        Path("recipes/pretrain.yaml").write_text(text + "\nprompts: []\n")
        assert cli.main(["run", "recipes/pretrain.yaml"]) == 0
        assert cli.main(["run", "recipes/tasks.yaml"]) == 0
    return folder


@pytest.fixture
def there(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that world, as the working directory."""
    folder = tmp_path / "world"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def toy_models(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `toy`, which generates, and `labels`, which classifies, with random weights."""
    from tests.serving import write_models

    folder = tmp_path_factory.mktemp("toy_models")
    write_models(folder, made / "runs" / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def served(toy_models: Path) -> Iterator[tuple[str, "Server"]]:
    """A server of them in a thread: its address, and itself. Its log is in `log` beside them."""
    from tests.serving import running

    folders = {name: str(toy_models / name) for name in ("toy", "labels")}
    with running(folders, toy_models / "log") as address_and_server:
        yield address_and_server
