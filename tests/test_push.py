"""`hfkit push` against a double of the Hub, by the real client: all of it or nothing, and nothing that is private."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.hub import push
from tests.hub_double import READER, STRANGER, Hub

ID = "ada/tiny"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own, at uploads
LORA = """\
stage: finetune
model: runs/pretrain
data: runs/pairs
task: generate
prompt: "{code}"
completion: " {summary}"
sequence_length: 32
lora: {r: 2}
evaluation_rows: 2
generation: {max_new_tokens: 4}
train: {max_steps: 1, per_device_train_batch_size: 2, bf16: false, torch_compile: false, logging_steps: 1}
"""
PAIRS = """\
stage: prepare
columns: {code: text, summary: text}
sources: [{files: pairs.jsonl}]
split: {validation: 0.2, test: 0.2}
"""


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial in a process of its own, and without waiting between attempts."""
    monkeypatch.setattr(push, "try_out", lambda *asked: None)
    monkeypatch.setattr(push.time, "sleep", lambda seconds: None)


def run_card(repo: str, hub: Hub, repo_type: str = "model") -> str:
    """Run the lines of a pushed card as they stand, in a process that knows only the Hub."""
    card = hub.files(repo, repo_type=repo_type)["README.md"].decode()
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert lines and repo in lines[1]
    blind = 'import sys; sys.modules.update({n: None for n in ["hfkit", *sys.modules] if n.split(".")[0] == "hfkit"})'
    command = [sys.executable, "-c", f"{blind}\n{lines[1]}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.environ["HF_HOME"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_and_its_adapter_are_pushed_and_used_elsewhere(
    hub: Hub, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"code": f"def f{number}(): pass", "summary": f"the cat sees tree {number}"} for number in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs), encoding="utf-8")
    for name, text in (("pairs", PAIRS), ("lora", LORA)):
        Path(f"recipes/{name}.yaml").write_text(text, encoding="utf-8")
    for name in ("pretrain", "pairs", "lora"):
        assert cli.main(["run", f"recipes/{name}.yaml"]) == 0

    # Its base is not on the Hub yet.
    assert cli.main(["push", "runs/lora", "lab/adapter"]) == 2
    assert "its base model runs/pretrain is not on the Hub; push that first: hfkit push" in capsys.readouterr().err
    assert not hub.state.repos
    assert cli.main(["push", "runs/pretrain", "tiny", "--private"]) == 0
    commit = hub.repo(ID).head("main").oid
    assert "/ada/tiny/commit/" + commit in capsys.readouterr().out
    assert len(run_card(ID, hub).split()) > 3

    # Everything arrives byte for byte, but for what tells of this machine.
    files, made = hub.files(ID), manifest.read_json(Path("runs/pretrain")) or {}
    assert set(files) == {*made["files"], "hfkit.json"} and hub.repo(ID).private
    assert files["model.safetensors"] == Path("runs/pretrain/model.safetensors").read_bytes()
    downloaded = Path(HfApi().snapshot_download(ID))
    assert all((downloaded / name).read_bytes() == content for name, content in files.items())
    there = json.loads(files["hfkit.json"])
    assert manifest.changed_files(downloaded, there) == [] and there["digest"] == made["digest"]
    assert made["pushed"] == {"repo": ID, "revision": "main", "commit": commit} and "pushed" not in there

    # Now the adapter names it, by its commit.
    assert cli.main(["push", "runs/lora", "lab/adapter"]) == 0
    config = json.loads(hub.files("lab/adapter")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (ID, commit)
    card = hub.files("lab/adapter")["README.md"].decode()
    assert f"base_model: {ID}" in card and f"on the Hub {ID} at {commit[:12]}" in card
    assert run_card("lab/adapter", hub).strip()


def test_a_data_set_is_pushed_and_loaded_elsewhere(hub: Hub, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", "runs/data", "lab/texts"]) == 0
    rows = (manifest.read_json(Path("runs/data")) or {})["metrics"]["splits"]
    shown = run_card("lab/texts", hub, "dataset")
    assert all(f"num_rows: {each['rows']}" in shown for each in rows.values())
    first = hub.repo("lab/texts", "dataset").head("main").oid
    assert cli.main(["push", "runs/data", "lab/texts"]) == 0
    assert "holds runs/data already" in capsys.readouterr().out
    assert hub.repo("lab/texts", "dataset").head("main").oid == first


def test_a_result_that_does_not_load_elsewhere_is_not_pushed(
    hub: Hub, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path("runs/tokenizer/tokenizer.json")
    config.write_text(config.read_text(encoding="utf-8").replace('"BPE"', '"Nothing"'), encoding="utf-8")
    made = manifest.read_json(Path("runs/tokenizer")) or {}
    manifest.finish(Path("runs/tokenizer"), {key: value for key, value in made.items() if key != "files"})
    assert cli.main(["push", "runs/tokenizer", ID]) == 2
    assert "cannot be used where hfkit is not installed" in capsys.readouterr().err
    assert not hub.state.repos


def test_a_push_is_one_commit_and_takes_away_what_is_gone(hub: Hub, ready: Path, untried: None) -> None:
    assert cli.main(["push", "runs/tokenizer", ID, "--revision", "v1"]) == 0
    first, repo = hub.files(ID, "v1"), hub.repo(ID)
    assert hub.files(ID) == {} and "tokenizer.json" in first
    (Path("runs/tokenizer") / "chat_template.jinja").unlink()
    made = manifest.read_json(Path("runs/tokenizer")) or {}
    manifest.finish(Path("runs/tokenizer"), {key: value for key, value in made.items() if key != "files"})
    before = len(repo.branches["v1"])
    assert cli.main(["push", "runs/tokenizer", ID, "--revision", "v1"]) == 0
    assert len(repo.branches["v1"]) == before + 1
    assert set(first) - set(hub.files(ID, "v1")) == {"chat_template.jinja"}


def unfinished(folder: Path) -> None:
    (folder / "hfkit.json").rename(folder / "hfkit.started.json")


def changed(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def an_evaluation(folder: Path) -> None:
    made = manifest.read_json(folder) or {}
    manifest.write_json(folder / "hfkit.json", {**made, "makes": "evaluation"})


def a_token_in_it(folder: Path) -> None:
    (folder / "notes").write_text(f"{'x' * 100} {os.environ['HF_TOKEN']}", encoding="utf-8")
    made = manifest.read_json(folder) or {}
    manifest.finish(folder, {key: value for key, value in made.items() if key != "files"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unfinished, "runs/tokenizer: is not finished; run its recipe to the end"),
        (changed, "runs/tokenizer: tokenizer.json changed since it was made; restore it"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "runs/tokenizer: tokenizer.json changed since it was made",
        ),
        (an_evaluation, "runs/tokenizer: is an evaluation; models, tokenizers and data sets are pushed"),
        (shutil.rmtree, "runs/tokenizer: there is no such folder"),
        (lambda folder: (folder / "hfkit.json").unlink(), "holds no hfkit.json: hfkit pushes what it made"),
        (a_token_in_it, "notes: holds a token or password of this machine's environment"),
    ],
)
def test_a_folder_that_is_not_whole_is_not_pushed(
    hub: Hub, ready: Path, untried: None, spoil: Callable, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(Path("runs/tokenizer"))
    assert cli.main(["push", "runs/tokenizer", ID]) == 2
    assert message in capsys.readouterr().err and not hub.state.repos


def other_files(hub: Hub) -> None:
    hub.create(ID)
    hub.commit(ID, {"model.bin": b"somebody's"})


def another_kind(hub: Hub) -> None:
    hub.create(ID)
    hub.commit(ID, {"hfkit.json": b'{"makes": "model"}'})


@pytest.mark.parametrize(
    ("prepare", "repo", "message"),
    [
        (
            lambda hub: os.environ.update(HF_TOKEN=""),
            ID,
            "there is no token for the Hub; set HF_TOKEN, or log in once",
        ),
        (lambda hub: os.environ.update(HF_TOKEN="hf_unknown"), ID, "the Hub does not know the token"),
        (lambda hub: os.environ.update(HF_TOKEN=READER), ID, "the token may only read"),
        (lambda hub: os.environ.update(HF_TOKEN=STRANGER), ID, "the token has no right to write there"),
        (lambda hub: os.environ.update(HF_HUB_OFFLINE="1"), "lab/a b", "is no valid id of a repository"),
        (
            lambda hub: hub.create(ID, repo_type="dataset"),
            ID,
            "is a dataset on the Hub, and runs/tokenizer is a token",
        ),
        (other_files, ID, "holds files that hfkit did not push"),
        (another_kind, ID, "holds a model, and runs/tokenizer is a tokenizer"),
        (lambda hub: hub.create(ID), ID, "is there already and public"),
    ],
)
def test_what_the_hub_has_against_it_is_told_before_anything_is_sent(
    hub: Hub,
    ready: Path,
    untried: None,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Hub], object],
    repo: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ[name])  # put back afterwards
    prepare(hub)
    before = {key: len(each.branches["main"]) for key, each in hub.state.repos.items()}
    private = ["--private"] if "public" in message else []
    assert cli.main(["push", "runs/tokenizer", repo, *private]) == 2
    assert message in capsys.readouterr().err
    assert {key: len(each.branches["main"]) for key, each in hub.state.repos.items()} == before
    assert not hub.calls("PUT", "/lfs/") and not hub.calls("POST", "/commit/")


# ---- faults


@pytest.mark.parametrize(
    "fault",
    [
        lambda hub: hub.fail("POST", "/repos/create", status=500),
        lambda hub: hub.fail("POST", "/preupload/", status=429, retry_after=3),
        lambda hub: hub.fail("PUT", "/lfs/", status=500, times=2),
        lambda hub: hub.drop("PUT", "/lfs/", times=8),
        lambda hub: hub.fail("POST", "/commit/", status=429, retry_after=3),
        lambda hub: hub.fail("POST", "/commit/", status=500, times=2),
        lambda hub: hub.drop("POST", "/commit/"),
        lambda hub: hub.lose("POST", "/commit/"),
    ],
    ids=["create 500", "429", "lfs 500", "lfs cut", "commit 429", "commit 500", "commit cut", "answer lost"],
)
def test_a_fault_that_passes_is_waited_out(hub: Hub, ready: Path, untried: None, fault: Callable) -> None:
    hub.state.lfs_limit = 2000
    fault(hub)
    assert cli.main(["push", "runs/tokenizer", ID]) == 0
    made = manifest.read_json(Path("runs/tokenizer")) or {}
    assert set(hub.files(ID)) == {*made["files"], "hfkit.json"}
    assert len(hub.repo(ID).branches["main"]) == 2  # the Hub's own first commit, and ours


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda hub: hub.fail("POST", "/commit/", status=401), "the Hub does not know the token"),
        (lambda hub: hub.fail("POST", "/commit/", status=403), "the token has no right to write there"),
        (lambda hub: hub.fail("POST", "/commit/", status=409), "somebody else has changed it in the meantime"),
        (lambda hub: hub.fail("POST", "/commit/", status=500, times=99), "the Hub is busy (status 500)"),
        (lambda hub: hub.fail("PUT", "/lfs/", status=500, times=99), "the Hub cannot be reached"),
        (lambda hub: hub.drop("PUT", "/lfs/", times=99), "the Hub cannot be reached"),
    ],
    ids=["401", "403", "409", "500", "lfs 500", "lfs cut"],
)
def test_a_fault_that_stays_leaves_nothing_to_see_and_the_rerun_completes(
    hub: Hub, ready: Path, untried: None, fault: Callable, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.state.lfs_limit = 2000
    fault(hub)
    assert cli.main(["push", "runs/tokenizer", ID]) == 2
    assert message in capsys.readouterr().err and hub.files(ID) == {}
    hub.faults.clear()
    assert cli.main(["push", "runs/tokenizer", ID]) == 0
    assert hub.files(ID)["tokenizer.json"] == Path("runs/tokenizer/tokenizer.json").read_bytes()


def test_a_push_that_is_killed_before_its_commit_is_done_by_the_next(hub: Hub, ready: Path) -> None:
    hub.state.lfs_limit = 2000
    clients: list[subprocess.Popen[bytes]] = []

    def kill(request: object) -> None:
        clients[-1].kill()
        raise ConnectionAbortedError

    hub.on("POST", "/commit/", kill)
    for returned, is_there in ((-9, False), (0, True)):
        clients.append(subprocess.Popen([sys.executable, "-m", "hfkit", "push", "runs/tokenizer", ID]))
        assert clients[-1].wait() == returned and ("tokenizer.json" in hub.files(ID)) == is_there
    assert len(hub.calls("PUT", "/lfs/")) == len({request.path for request in hub.calls("PUT", "/lfs/")})


# ---- recipes that push, and what stays here


@pytest.fixture
def pushing(ready: Path) -> Path:
    """The recipe of the tokenizer, of which nothing is made, with a repository in it."""
    shutil.rmtree("runs/tokenizer")
    recipe = Path("recipes/tokenizer.yaml")
    recipe.write_text(f"{recipe.read_text(encoding='utf-8')}push: {{repo: {ID}, private: true}}\n", encoding="utf-8")
    return recipe


def test_a_recipe_pushes_what_it_made_and_once(
    hub: Hub, pushing: Path, untried: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(pushing)]) == 0
    assert "runs/tokenizer is pushed: " in capsys.readouterr().out
    assert hub.repo(ID).private and "tokenizer.json" in hub.files(ID)
    assert b"push" not in hub.files(ID)["hfkit.json"]
    assert cli.main(["run", str(pushing)]) == 0
    shown = capsys.readouterr().out
    assert "nothing to do" in shown and "nothing to push" in shown and len(hub.repo(ID).branches["main"]) == 2
    pushing.write_text(pushing.read_text(encoding="utf-8").replace(ID, "lab/other"), encoding="utf-8")
    assert cli.main(["run", str(pushing)]) == 0  # another repository makes no other tokenizer
    assert "tokenizer.json" in hub.files("lab/other")


def test_a_push_that_fails_does_not_fail_the_run(
    hub: Hub, pushing: Path, untried: None, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/commit/", status=500, times=99)
    assert cli.main(["run", str(pushing)]) == 0
    shown = capsys.readouterr().out
    assert (
        "WARNING: ada/tiny: the Hub is busy" in shown and (manifest.read_json(Path("runs/tokenizer")) or {})["files"]
    )
    hub.faults.clear()
    command = shown.rpartition("Push it later: ")[2].split()
    assert command == ["hfkit", "push", "runs/tokenizer", ID, "--private"]
    assert cli.main(command[1:]) == 0 and "tokenizer.json" in hub.files(ID)


def test_without_a_token_a_recipe_that_pushes_does_not_begin(
    hub: Hub, pushing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert cli.main(["run", str(pushing)]) == 2
    assert "there is no token for the Hub" in capsys.readouterr().err and not Path("runs/tokenizer").exists()
    assert cli.main(["run", str(pushing), "push.repo=a b"]) == 2
    assert "command line: push.repo=a b: Repo id must use alphanumeric chars" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_token_in_a_recipe_is_refused_and_not_shown(
    place: str, pushing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "correct-horse-battery"
    monkeypatch.setenv("MY_API_KEY", secret)
    for token in (secret, "hf_" + "a" * 34):
        line = f"vocab_size: {token}"
        if place == "file":
            pushing.write_text(f"stage: tokenizer\n{line}\n", encoding="utf-8")
        assert cli.main(["run", str(pushing), *([f"vocab_size={token}"] if place == "command line" else [])]) == 2
        told = "".join(capsys.readouterr())
        assert "holds a token or password; delete it: tokens come from the environment" in told
        assert token not in told and (f"{pushing}:2" if place == "file" else "command line") in told


def test_the_home_folder_and_the_user_stay_here(
    hub: Hub, world: Path, untried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "alice"
    (home / "work").mkdir(parents=True)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("LOGNAME", "alice")
    shutil.move("texts.txt", home / "texts.txt")
    monkeypatch.chdir(home / "work")
    options = [f"sources.0.files={home}/texts.txt", f"output_dir={home}/work/made"]
    assert cli.main(["run", str(world / "recipes/data.yaml"), *options]) == 0
    assert cli.main(["push", f"{home}/work/made", "lab/texts"]) == 0
    import pyarrow.parquet

    sources = pyarrow.parquet.read_table(home / "work/made/train.parquet")["source"].to_pylist()
    assert all(source.startswith("~/texts.txt:") for source in sources)
    files = hub.files("lab/texts", repo_type="dataset")
    assert b"~/texts.txt" in files["hfkit.json"] and b"alice" in (home / "work/made/hfkit.json").read_bytes()
    assert not any(b"alice" in content for content in files.values()) and b"alice" not in hub.sent()
