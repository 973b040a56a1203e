"""The same pushes against the true Hub: `HF_TOKEN=... pytest -m hub`. It deletes the repositories that it makes."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, get_token

from hfkit import cli
from hfkit.artifacts import manifest

pytestmark = pytest.mark.hub


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> HfApi:
    if not get_token():
        pytest.fail("these tests need a token that may write: set HF_TOKEN")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return HfApi()


@pytest.fixture
def repo(api: HfApi) -> Iterator[str]:
    name = f"{api.whoami()['name']}/hfkit-test-{uuid.uuid4().hex[:12]}"
    yield name
    for kind in ("model", "dataset"):
        api.delete_repo(name, repo_type=kind, missing_ok=True)


@pytest.mark.parametrize("folder", ["runs/tokenizer", "runs/data", "runs/pretrain"])
def test_a_folder_arrives_whole_and_once(
    folder: str, api: HfApi, repo: str, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if folder == "runs/pretrain":
        assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=2"]) == 0
    kind = "dataset" if folder == "runs/data" else "model"
    assert cli.main(["push", folder, repo, "--private"]) == 0
    info = api.repo_info(repo, repo_type=kind)
    downloaded = Path(api.snapshot_download(repo, repo_type=kind, local_dir=ready / "downloaded"))
    there = manifest.read_json(downloaded) or {}
    assert info.private and manifest.changed_files(downloaded, there) == []
    assert there["digest"] == (manifest.read_json(Path(folder)) or {})["digest"]
    capsys.readouterr()
    assert cli.main(["push", folder, repo, "--private"]) == 0
    assert "nothing to push" in capsys.readouterr().out
    assert len(api.list_repo_commits(repo, repo_type=kind)) == 2


def test_a_branch_and_what_is_refused(
    api: HfApi, repo: str, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", "runs/tokenizer", repo, "--private", "--revision", "v1"]) == 0
    assert "tokenizer.json" not in api.list_repo_files(repo)
    assert "tokenizer.json" in api.list_repo_files(repo, revision="v1")
    for token, message in (("hf_" + "x" * 34, "the Hub does not know the token"), ("", "there is no token")):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_TOKEN_PATH", os.devnull)
        assert cli.main(["push", "runs/tokenizer", repo]) == 2
        assert message in capsys.readouterr().err
