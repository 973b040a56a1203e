"""The double of the Hub answers the real client as the client expects."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors, get_session
from huggingface_hub.hf_api import CommitInfo

from tests.hub_double import READER, STRANGER, WRITER, Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, at LFS uploads
ID = "ada/tiny"
WEIGHTS = bytes(range(256)) * 3000
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Tiny\n",
    "config.json": b'{"hidden_size": 32}',
    "empty.bin": b"",
    "model.safetensors": WEIGHTS,
    "code/a b/caf\u00e9.py": b"print(1)\n",
}
LFS = {"model.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def push(folder: Path, token: str | bool | None = None, **options: str) -> CommitInfo:
    HfApi(token=token).create_repo(ID, exist_ok=True)
    return HfApi(token=token).upload_folder(folder_path=folder, repo_id=ID, **options)


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_a_new_repository_takes_a_folder_and_gives_it_back(hub: Hub, folder: Path, repo_type: str) -> None:
    api = HfApi()
    api.create_repo("tiny", repo_type=repo_type, space_sdk="static" if repo_type == "space" else None)
    pushed = api.upload_folder(folder_path=folder, repo_id=ID, repo_type=repo_type)
    assert hub.files(ID, repo_type=repo_type) == hub.files(ID, pushed.oid, repo_type) == FILES
    assert {path for path, blob in hub.repo(ID, repo_type).head("main").files.items() if blob.is_lfs} == LFS
    snapshot = Path(api.snapshot_download(ID, repo_type=repo_type))
    assert len([path for path in snapshot.rglob("*") if path.is_file()]) == len(FILES) + 1  # .gitattributes
    assert all((snapshot / path).read_bytes() == content for path, content in FILES.items())
    assert snapshot.name == pushed.oid and snapshot.is_relative_to(os.environ["HF_HOME"])


def test_files_are_listed_and_read_in_part(hub: Hub, folder: Path) -> None:
    api = HfApi()
    push(folder)
    assert sorted(api.list_repo_files(ID)) == sorted([*FILES, ".gitattributes"])
    assert [entry.path for entry in api.list_repo_tree(ID, "code")] == ["code/a b"]
    top = {entry.path: entry for entry in api.list_repo_tree(ID)}
    assert set(top) == {*FILES, ".gitattributes", "code"} - {"code/a b/caf\u00e9.py"}
    weights, blob = top["model.safetensors"], hub.repo(ID).head("main").files["model.safetensors"]
    assert (weights.size, weights.lfs.sha256, weights.blob_id) == (len(WEIGHTS), blob.sha256, blob.git_sha1)
    assert api.file_exists(ID, "config.json") and not api.file_exists(ID, "config.yaml")
    part = get_session().get(f"{hub.url}/{ID}/resolve/main/model.safetensors", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, WEIGHTS[10:20])


def test_a_commit_holds_what_is_new_and_no_more(hub: Hub, folder: Path) -> None:
    api, first = HfApi(), push(folder)
    assert push(folder).oid == first.oid and len(api.list_repo_commits(ID)) == 2
    (folder / "model.safetensors").write_bytes(WEIGHTS[1:])
    second = push(folder)
    assert hub.files(ID) == FILES | {"model.safetensors": WEIGHTS[1:]} and hub.files(ID, first.oid) == FILES
    assert b"config.json" not in hub.calls("POST", "/commit/")[-1].body
    less = [CommitOperationDelete("code/"), CommitOperationDelete("config.json")]
    api.create_commit(ID, less, commit_message="Less", parent_commit=second.oid)
    assert set(hub.files(ID)) == {"README.md", "empty.bin", "model.safetensors"}
    with pytest.raises(errors.RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(ID, [CommitOperationDelete("config.json")], commit_message="Less")


def test_a_branch_has_its_own_commits(hub: Hub, folder: Path) -> None:
    api, first, repo = HfApi(), push(folder), hub.repo(ID)
    api.create_branch(ID, branch="step/100")
    with pytest.raises(errors.HfHubHTTPError, match="Reference already exists"):
        api.create_branch(ID, branch="step/100")
    (folder / "config.json").write_bytes(b"{ }")
    hub.state.lfs_limit = 2
    second = push(folder, revision="step/100")
    assert hub.files(ID, "step/100")["config.json"] == b"{ }" and hub.files(ID) == FILES
    assert repo.head("step/100").files["config.json"].is_lfs and not repo.head("main").files["config.json"].is_lfs
    assert api.model_info(ID).sha == first.oid and api.model_info(ID, revision="step/100").sha == second.oid
    assert [branch.name for branch in api.list_repo_refs(ID).branches] == ["main", "step/100"]
    with pytest.raises(errors.RevisionNotFoundError):
        push(folder, revision="nowhere")


def test_who_may_do_what(hub: Hub, folder: Path) -> None:
    assert HfApi().whoami()["name"] == "ada"
    HfApi().create_repo(ID, private=True)
    hub.create("ada/open")
    for token, status in ((READER, 403), (STRANGER, 403), ("hf_unknown", 401), (False, 401)):
        with pytest.raises(errors.HfHubHTTPError) as refused:
            push(folder, token)
        assert refused.value.response.status_code == status
    for token, exists in ((WRITER, True), (READER, True), (STRANGER, False), (False, False)):
        assert HfApi(token=token).repo_exists(ID) == exists and HfApi(token=token).repo_exists("ada/open")
    with pytest.raises(errors.RepositoryNotFoundError, match="401"):
        HfApi(token=False).snapshot_download(ID)
    with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden: Authorization error"):
        HfApi(token=STRANGER).upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ada/open")
    assert hub.files(ID) == hub.files("ada/open") == {}


def test_creating_what_exists(hub: Hub) -> None:
    HfApi().create_repo("lab/tiny")
    with pytest.raises(errors.HfHubHTTPError, match="You already created this model repo"):
        HfApi().create_repo("lab/tiny")
    for token in (WRITER, STRANGER):  # who may not create one is told whether it exists
        assert HfApi(token=token).create_repo("lab/tiny", exist_ok=True).repo_id == "lab/tiny"
    for token, status in ((STRANGER, 403), (READER, 403), (False, 401)):
        with pytest.raises(errors.HfHubHTTPError, match=str(status)):
            HfApi(token=token).create_repo("lab/other", exist_ok=True)


def test_a_commit_on_an_old_parent_is_refused(hub: Hub) -> None:
    parent = hub.create(ID).head("main").oid
    hub.on("POST", "/commit/", lambda request: hub.commit(ID, {"b": b"theirs"}))
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as refused:
        HfApi().create_commit(ID, [CommitOperationAdd("a", b"ours")], commit_message="Ours", parent_commit=parent)
    assert refused.value.response.status_code == 412 and hub.files(ID) == {"b": b"theirs"}


@pytest.mark.parametrize("status", [401, 403, 409, 412, 429, 500])
def test_a_refused_commit_leaves_nothing_and_can_be_done_again(hub: Hub, folder: Path, status: int) -> None:
    hub.fail("POST", "/commit/", status=status, retry_after=7)
    with pytest.raises(errors.HfHubHTTPError) as refused:
        push(folder)
    assert refused.value.response.status_code == status and hub.files(ID) == {}
    assert hub.waits == []  # the client does not try again
    assert push(folder) and hub.files(ID) == FILES and len(hub.calls("PUT", "/lfs/")) == 1


def test_an_upload_is_tried_again_and_again(hub: Hub, folder: Path) -> None:
    hub.fail("PUT", "/lfs/", status=429, retry_after=7)
    hub.fail("PUT", "/lfs/", status=500, times=2)
    hub.drop("PUT", "/lfs/", times=3)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'") as broken:
        push(folder)
    assert isinstance(broken.value.__cause__, errors.HTTPError) and hub.waits == [7 + 1, 2, 4, 8, 8]
    assert hub.calls("PUT", "/lfs/")[-1].body == WEIGHTS[: len(WEIGHTS) // 2]
    assert hub.files(ID) == {} and hub.repo(ID).objects == {}
    assert push(folder) and hub.files(ID) == FILES


def test_an_object_without_a_commit_is_seen_nowhere(hub: Hub, folder: Path) -> None:
    repo = hub.create(ID)
    hub.drop("POST", "/commit/")
    with pytest.raises(errors.HTTPError):
        push(folder)
    assert [blob.content for blob in repo.objects.values()] == [WEIGHTS] and hub.files(ID) == {}
    assert not HfApi().file_exists(ID, "model.safetensors") and HfApi().list_repo_files(ID) == [".gitattributes"]
    hub.lose("POST", "/commit/")
    with pytest.raises(errors.HTTPError):
        push(folder)
    assert push(folder).oid == repo.head("main").oid and len(repo.branches["main"]) == 2


def test_a_client_is_killed_before_its_commit_and_runs_again(hub: Hub, folder: Path) -> None:
    hub.create(ID)
    command = f"import huggingface_hub as h; h.upload_folder(folder_path={str(folder)!r}, repo_id={ID!r})"
    clients: list[subprocess.Popen[bytes]] = []

    def kill(request: object) -> None:
        clients[-1].kill()
        raise ConnectionAbortedError

    hub.on("POST", "/commit/", kill)
    for returned, files in ((-9, {}), (0, FILES)):
        clients.append(subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL))
        assert clients[-1].wait() == returned and hub.files(ID) == files
    assert len(hub.calls("PUT", "/lfs/")) == 1


def test_what_was_sent_is_kept_in_clear(hub: Hub, folder: Path) -> None:
    hub.fail("GET", "/api/whoami", status=500, skip=1)
    assert [get_session().get(f"{hub.url}/api/whoami-v2").status_code for _ in range(3)] == [401, 500, 401]
    push(folder)
    assert all(content in hub.sent() for content in FILES.values()) and WRITER.encode() not in hub.sent()
    assert hub.calls("POST", "/commit/")[0].token == WRITER and hub.calls("PUT", "/lfs/")[0].token == ""
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push(folder)


def test_tests_without_it_are_offline() -> None:
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1" and "HF_ENDPOINT" not in os.environ
    with pytest.raises(errors.OfflineModeIsEnabled):
        HfApi().model_info(ID)
