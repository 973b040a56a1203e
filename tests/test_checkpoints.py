"""Checkpoints are whole or not there: every interruption of writing one, and every damage to one."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from hfkit.artifacts import manifest
from hfkit.errors import HfkitError
from hfkit.training import checkpoints

FINGERPRINT = "f" * 64
CONTENT = {
    "model.safetensors": b"weights" * 1000,
    "optimizer.pt": b"moments" * 1000,
    "part/rank_0.bin": b"rank" * 1000,
}


def write(folder: Path) -> None:
    """What a trainer would write into the folder that it is given."""
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def commit(run: Path, step: int, put: Callable[[Path], None] = write, **options: Any) -> bool:
    values = {"needed_bytes": 1000, "keep": 2, "best": None, **options}
    return checkpoints.commit(run, step, put, **values).wait()


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has begun and committed nothing."""
    manifest.write_json(tmp_path / manifest.STARTED, {"fingerprint": FINGERPRINT})
    return tmp_path


# ---- writing


def test_a_commit_describes_every_file(run: Path) -> None:
    assert commit(run, 5)
    assert names(run) == {"checkpoint-5", manifest.STARTED}
    description = json.loads((run / "checkpoint-5/checkpoint.json").read_text(encoding="utf-8"))
    assert description["step"] == 5 and description["fingerprint"] == FINGERPRINT
    assert {name: entry["size"] for name, entry in description["files"].items()} == {
        name: len(content) for name, content in CONTENT.items()
    }
    assert checkpoints.newest(run) == run / "checkpoint-5"
    assert checkpoints.committed(run) == {5: run / "checkpoint-5"} and checkpoints.has_any(run)


def test_until_a_commit_is_done_the_run_has_what_it_had(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the disk is waited for; the checkpoint is not there before, nor is the old one gone."""
    assert commit(run, 1)
    disk, sync = threading.Event(), manifest.sync

    def slow(path: Path) -> None:
        assert disk.wait(10)
        sync(path)

    monkeypatch.setattr(manifest, "sync", slow)
    on_its_way = checkpoints.commit(run, 2, write, needed_bytes=1000, keep=1, best=None)
    assert list(checkpoints.committed(run)) == [1]
    disk.set()
    assert on_its_way.wait() and on_its_way.wait()
    assert list(checkpoints.committed(run)) == [2]


def test_what_is_there_is_not_written_again(run: Path) -> None:
    assert commit(run, 5)
    assert commit(run, 5, put=lambda folder: pytest.fail("it was written again"))


def test_everything_is_synced_and_described_before_the_rename(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the description, then the folders in it, then the rename, then the list of names of the run."""
    events: list[str] = []
    replace, sync, written = Path.replace, manifest.sync, manifest.write_json

    def seen_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return replace(self, target)

    def seen_sync(path: Path) -> None:
        sync(path)
        events.append(f"sync {path.name}")

    def seen_write(path: Path, value: dict[str, Any]) -> None:
        written(path, value)
        events.append(f"write {path.name}")

    monkeypatch.setattr(Path, "replace", seen_replace)
    monkeypatch.setattr(manifest, "sync", seen_sync)
    monkeypatch.setattr(manifest, "write_json", seen_write)
    assert commit(run, 5)
    described, renamed = events.index("write checkpoint.json"), events.index("rename to checkpoint-5")
    assert {"sync model.safetensors", "sync optimizer.pt", "sync rank_0.bin"} <= set(events[:described])
    assert described < events.index("sync part") < renamed
    assert "sync .checkpoint-5.partial" in events[described - 1 : renamed]  # the list of names in the checkpoint
    assert f"sync {run.name}" in events[renamed:] and events[-1] == f"write {manifest.STARTED}"


@pytest.mark.parametrize("broken", ["rename", "description", "file"])
def test_a_kill_before_the_rename_leaves_no_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A kill is an exception that nobody catches; what it leaves is swept, and the next commit works."""

    class Killed(BaseException):
        pass

    def kill(*arguments: Any, **keywords: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if broken == "rename":
            patch.setattr(Path, "replace", kill)
        elif broken == "description":
            patch.setattr(manifest, "write_json", kill)
        commit(run, 5, put=(lambda folder: (write(folder), kill())) if broken == "file" else write)  # type: ignore[func-returns-value]
    assert names(run) == {".checkpoint-5.partial", manifest.STARTED}
    assert not checkpoints.has_any(run) and checkpoints.newest(run) is None
    assert names(run) == {manifest.STARTED}, "the leftover was not swept"
    (run / ".checkpoint-5.partial/stale").mkdir(parents=True)
    assert commit(run, 5) and names(run) == {"checkpoint-5", manifest.STARTED}
    assert not (run / "checkpoint-5/stale").exists() and checkpoints.newest(run) == run / "checkpoint-5"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "optimizer.pt"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "torch", "safetensors"],
)
def test_a_full_disk_does_not_stop_the_training(
    run: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """The commit returns False and says why; what was there before is whole, what was half written is gone."""

    def put(folder: Path) -> None:
        write(folder)
        raise error

    for step, kept in ((1, "there is none yet"), (3, "checkpoint-2 is untouched")):
        assert not commit(run, step, put)
        told = capsys.readouterr().out
        assert f"WARNING: the checkpoint of step {step} was not written: " in told
        assert any(words in told for words in ("No space left", "PytorchStreamWriter failed"))
        assert told.endswith(f". {kept}.\n")
        assert commit(run, 2)
    assert names(run) == {"checkpoint-2", manifest.STARTED}
    assert not checkpoints.problems_with(run / "checkpoint-2")


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("x"), SafetensorError("no header")])
def test_another_failure_while_writing_is_raised(run: Path, error: Exception) -> None:
    def put(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)):
        commit(run, 5, put)
    assert not (run / "checkpoint-5").exists()


def free_space(monkeypatch: pytest.MonkeyPatch, run: Path, total: int) -> None:
    """Let the disk have room for `total` checkpoints of 10 MB."""

    def usage(path: Path) -> Any:
        return type("Usage", (), {"free": 10_000_000 * (total - len(checkpoints.committed(run)))})

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)


def test_room_is_made_by_what_would_go_anyway(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_ten_megabytes(folder: Path) -> None:
        with (folder / "optimizer.pt").open("wb") as file:
            file.truncate(10_000_000)

    assert commit(run, 1, write_ten_megabytes) and commit(run, 2, write_ten_megabytes)
    free_space(monkeypatch, run, total=2)
    assert commit(run, 3, needed_bytes=5_000_000)
    assert list(checkpoints.committed(run)) == [2, 3]


def test_the_last_checkpoint_is_never_given_for_room(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commit(run, 1, keep=1)
    free_space(monkeypatch, run, total=1)
    for keep in (1, 2, None):
        assert not commit(run, 2, needed_bytes=5_000_000, keep=keep, put=lambda folder: pytest.fail("no room"))
        assert names(run) == {"checkpoint-1", manifest.STARTED}
    told = capsys.readouterr().out
    assert f"0.0 MB are free in {run}, 6.0 MB are needed; make room" in told and "checkpoint-1 is untouched" in told


def test_where_there_is_no_room_whatever_goes_nothing_goes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`commit` promises that what was committed before is untouched."""
    assert commit(run, 1) and commit(run, 2)
    free_space(monkeypatch, run, total=3)
    assert not commit(run, 3, needed_bytes=90_000_000)
    assert list(checkpoints.committed(run)) == [1, 2]


# ---- rotation


def test_rotation_keeps_the_newest_and_the_best(run: Path) -> None:
    for step in (2, 4, 10, 12):
        assert commit(run, step, best=2 if step > 2 else None)
    assert list(checkpoints.committed(run)) == [2, 10, 12]
    assert commit(run, 14, best=12, keep=1)
    assert list(checkpoints.committed(run)) == [12, 14]
    assert commit(run, 16, keep=None) and commit(run, 18, keep=None)
    assert list(checkpoints.committed(run)) == [12, 14, 16, 18]


def test_a_kill_while_rotating_leaves_nothing_that_looks_like_a_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(path: Path) -> None:
        (path / "model.safetensors").unlink()
        raise Killed

    assert commit(run, 1, keep=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints.shutil, "rmtree", kill)
        commit(run, 2, keep=1)
    assert list(checkpoints.committed(run)) == [2]
    assert checkpoints.newest(run) == run / "checkpoint-2"
    assert names(run) == {"checkpoint-2", manifest.STARTED}, "the half removed one was not swept"


# ---- reading


def change(path: Path, edit: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def cut(content: bytearray) -> None:
    del content[-1:]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda c: change(c / "optimizer.pt", cut),
        "optimizer.pt: has 6999 bytes instead of 7000",
    ),
    "longer": (
        lambda c: change(c / "optimizer.pt", lambda content: content.extend(b"x")),
        "optimizer.pt: has 7001 bytes instead of 7000",
    ),
    "empty": (
        lambda c: (c / "optimizer.pt").write_bytes(b""),
        "optimizer.pt: has 0 bytes instead of 7000",
    ),
    "one bit": (
        lambda c: change(c / "model.safetensors", flip),
        "model.safetensors: its content is not what was written (SHA-256)",
    ),
    "zeros": (
        lambda c: (c / "model.safetensors").write_bytes(bytes(7000)),
        "model.safetensors: its content is not what was written (SHA-256)",
    ),
    "a file is missing": (lambda c: (c / "part/rank_0.bin").unlink(), "rank_0.bin: No such file or directory"),
    "a folder is missing": (lambda c: shutil.rmtree(c / "part"), "rank_0.bin: No such file or directory"),
    "no description": (lambda c: (c / "checkpoint.json").unlink(), "checkpoint.json: is missing"),
    "cut description": (lambda c: change(c / "checkpoint.json", cut_much), "checkpoint.json: is damaged"),
    "empty description": (lambda c: (c / "checkpoint.json").write_bytes(b""), "checkpoint.json: is damaged"),
    "binary description": (
        lambda c: (c / "checkpoint.json").write_bytes(b"\xff\xfe\x00"),
        "checkpoint.json: is damaged",
    ),
    "a list": (lambda c: (c / "checkpoint.json").write_text("[1]"), "checkpoint.json: is damaged"),
    "no keys": (lambda c: (c / "checkpoint.json").write_text("{}"), "checkpoint.json: is damaged"),
    "one bit of the description": (
        lambda c: change(c / "checkpoint.json", flip_digit),
        "checkpoint.json: is damaged",
    ),
}


def cut_much(content: bytearray) -> None:
    del content[len(content) // 2 :]


def flip_digit(content: bytearray) -> None:
    """It stays JSON: one digit of a size is another one."""
    content[content.index(b"7000")] ^= 1
    json.loads(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_told_and_set_aside(run: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """The one before is taken instead, and the damaged one stays for whoever wants to look at it."""
    harm, words = DAMAGES[damage]
    assert commit(run, 1) and commit(run, 2)
    harm(run / "checkpoint-2")
    assert checkpoints.problems_with(run / "checkpoint-2") == [words]
    assert checkpoints.newest(run) == run / "checkpoint-1"
    told = capsys.readouterr().out
    assert f"WARNING: checkpoint-2 is damaged and set aside as checkpoint-2.corrupt:\n    {words}\n" in told
    assert names(run) == {"checkpoint-1", "checkpoint-2.corrupt", manifest.STARTED}
    assert list(checkpoints.committed(run)) == [1]


def test_a_checkpoint_under_a_wrong_name_is_damaged(run: Path) -> None:
    assert commit(run, 1)
    (run / "checkpoint-1").rename(run / "checkpoint-7")
    assert checkpoints.problems_with(run / "checkpoint-7") == ["checkpoint.json: describes step 1"]


def test_the_same_step_may_be_damaged_twice_and_a_corrupt_one_is_never_taken(run: Path) -> None:
    assert commit(run, 1)
    for _ in range(2):
        assert commit(run, 2)
        change(run / "checkpoint-2/optimizer.pt", flip)
        assert checkpoints.newest(run) == run / "checkpoint-1"
    assert names(run) >= {"checkpoint-2.corrupt", "checkpoint-2.corrupt2"}
    shutil.rmtree(run / "checkpoint-2.corrupt2")
    assert commit(run, 2)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9.corrupt")
    assert checkpoints.newest(run) == run / "checkpoint-2"


def test_rotation_does_not_touch_what_was_set_aside(run: Path) -> None:
    assert commit(run, 1)
    (run / "checkpoint-1").rename(run / "checkpoint-1.corrupt")
    for step in (2, 3, 4):
        assert commit(run, step, keep=1)
    assert names(run) == {"checkpoint-1.corrupt", "checkpoint-4", manifest.STARTED}


def test_where_none_can_be_used_nothing_is_begun_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commit(run, 1) and commit(run, 2)
    for step in (1, 2):
        for name in CONTENT:
            change(run / f"checkpoint-{step}" / name, cut)
    assert len(checkpoints.problems_with(run / "checkpoint-2")) == len(CONTENT), "every damaged file is told"
    for _ in range(2):  # also when asked again
        with pytest.raises(HfkitError) as caught:
            checkpoints.newest(run)
        message = str(caught.value)
        assert f"{run}: this run has committed checkpoints, but none can be used:" in message
        assert all(str(run / f"checkpoint-{step}.corrupt") in message for step in (1, 2))
        assert "Nothing was begun anew" in message and "--fresh" in message and "Restore one" in message
    (run / "checkpoint-1.corrupt").rename(run / "checkpoint-1")
    write(run / "checkpoint-1")
    assert checkpoints.newest(run) == run / "checkpoint-1", "a restored one is taken"


def test_where_all_were_deleted_nothing_is_begun_anew(run: Path) -> None:
    assert commit(run, 1)
    shutil.rmtree(run / "checkpoint-1")
    assert checkpoints.has_any(run)
    with pytest.raises(HfkitError, match="none can be used: all of them are gone\n.*--fresh"):
        checkpoints.newest(run)


def test_a_run_that_never_committed_has_none(run: Path) -> None:
    assert checkpoints.newest(run) is None and not checkpoints.has_any(run)


def test_a_checkpoint_of_another_run_is_refused_unless_it_is_admitted(run: Path) -> None:
    assert commit(run, 1)
    manifest.write_json(run / manifest.STARTED, {"fingerprint": "e" * 64, "committed": True})
    with pytest.raises(
        HfkitError, match="checkpoint-1: belongs to a run of another recipe, data or tokenizer"
    ) as caught:
        checkpoints.newest(run)
    assert f"fingerprint {FINGERPRINT[:12]}" in str(caught.value) and "--force" in str(caught.value)
    assert (run / "checkpoint-1").is_dir()
    manifest.write_json(run / manifest.STARTED, {"fingerprint": "e" * 64, "forced_from": ["d" * 64, FINGERPRINT]})
    assert checkpoints.newest(run) == run / "checkpoint-1"
