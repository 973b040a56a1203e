"""The newest checkpoint is damaged: it is set aside with a warning, and the run goes on from the one before."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Ledger
from tests.faults.world import Result, World, must_tell, sha256, two_at_a_time

pytestmark = pytest.mark.faults
NewWorld = Callable[..., World]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_by_one(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def bit_flipped(path: Path, share: float = 0.5, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[int((len(content) - 1) * share)] ^= bit
    path.write_bytes(content)


def last_bit_flipped(path: Path) -> None:
    bit_flipped(path, 1.0, 4)


def removed(path: Path) -> None:
    path.unlink()


DAMAGES = [truncated, cut_by_one, emptied, zeroed, bit_flipped, last_bit_flipped, removed]
FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "progress_0.json",
    "config.json",
    "generation_config.json",
    "modeling_hfkit.py",
    "configuration_hfkit.py",
    "checkpoint.json",
]


def survive(
    ledger: Ledger, new: NewWorld, stopped: World, expected: Result, name: str, damage: Callable[[Path], None]
) -> None:
    with ledger.faults(f"newest checkpoint: a file {damage.__name__}"):
        world = new(stopped)
        damage(world.out / "checkpoint-12" / name)
        text = world.ends_as(expected)
        told = "WARNING: checkpoint-12 is damaged and set aside as checkpoint-12.corrupt:"
        must_tell(told in text, f"no warning in:\n{text}")
        must_tell(f"{name}: " in text.split(told)[1].split("resuming from")[0], f"{name} is not named in:\n{text}")
        must_tell(f"resuming from {world.out.relative_to(world.folder)}/checkpoint-8" in text, text)


def test_the_files_damaged_are_those_of_a_checkpoint(stopped: World) -> None:
    assert {path.name for path in (stopped.out / "checkpoint-12").iterdir()} == set(FILES)


@pytest.mark.quick
def test_newest_checkpoint_is_damaged_in_some_ways(
    ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result
) -> None:
    cases = [("model.safetensors", bit_flipped), ("checkpoint.json", removed)]
    two_at_a_time(cases, lambda case: survive(ledger, new, stopped, uninterrupted, *case))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_any_file_of_the_newest_checkpoint_is_damaged(
    ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result, damage: Callable[[Path], None]
) -> None:
    two_at_a_time(FILES, lambda name: survive(ledger, new, stopped, uninterrupted, name, damage))


def test_the_folder_is_there_and_empty(ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result) -> None:
    with ledger.faults("newest checkpoint: empty folder"):
        world = new(stopped)
        shutil.rmtree(world.out / "checkpoint-12")
        (world.out / "checkpoint-12").mkdir()
        text = world.ends_as(uninterrupted)
        must_tell("checkpoint.json: is missing" in text, text)


def test_another_checkpoint_under_its_name(
    ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result
) -> None:
    with ledger.faults("newest checkpoint: an older one under its name"):
        world = new(stopped)
        shutil.rmtree(world.out / "checkpoint-12")
        shutil.copytree(world.out / "checkpoint-8", world.out / "checkpoint-12")
        text = world.ends_as(uninterrupted)
        must_tell("checkpoint.json: describes step 8" in text, text)


def content_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.quick
def test_all_checkpoints_are_damaged(ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result) -> None:
    """The run refuses with their list, changes no file of them, and again; only --fresh begins anew."""
    with ledger.faults("all checkpoints damaged", 2):
        world = new(stopped)
        bit_flipped(world.out / "checkpoint-12/optimizer.pt")
        truncated(world.out / "checkpoint-8/model.safetensors")
        # What the kill left of a checkpoint that was being removed is not of the run, and is swept.
        before = {name: value for name, value in content_of(world.out).items() if ".partial/" not in name}
        for _ in range(2):
            text = world.run(code=2)
            must_tell("this run has committed checkpoints, but none can be used:" in text, text)
            assert "checkpoint-8.corrupt" in text and "checkpoint-12.corrupt" in text and "--fresh" in text, text
        aside = {name.replace("checkpoint-8/", "checkpoint-8.corrupt/") for name in before}
        aside = {name.replace("checkpoint-12/", "checkpoint-12.corrupt/") for name in aside}
        after = content_of(world.out)
        assert after.keys() == aside and sorted(after.values()) == sorted(before.values())
        world.run("--fresh")
        assert world.result() == uninterrupted


def test_all_checkpoints_are_gone(ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result) -> None:
    with ledger.faults("all checkpoints gone"):
        world = new(stopped)
        for step in world.steps():
            shutil.rmtree(world.out / f"checkpoint-{step}")
        text = world.run(code=2)
        must_tell("none can be used: all of them are gone" in text, text)
        world.run("--fresh")
        assert world.result() == uninterrupted


def other_files() -> dict[str, Callable[[World], Any]]:
    """What a crash may do to the files beside the checkpoints."""

    def log(change: Callable[[bytes], bytes]) -> Callable[[World], Any]:
        def damage(world: World) -> None:
            path = world.out / "metrics.jsonl"
            path.write_bytes(change(path.read_bytes()))

        return damage

    return {
        "last line of the log cut": log(lambda content: content[:-20]),
        "zeros at the end of the log": log(lambda content: content + bytes(100)),
        "half a checkpoint beside": lambda world: shutil.copytree(
            world.out / "checkpoint-12", world.out / ".checkpoint-16.partial"
        ),
        "a rotation left half done": lambda world: (world.out / "checkpoint-8").rename(
            world.out / ".checkpoint-8.old.partial"
        ),
    }


@pytest.mark.parametrize("what", other_files())
def test_what_a_crash_leaves_beside_the_checkpoints(
    ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result, what: str
) -> None:
    with ledger.faults(f"beside the checkpoints: {what}"):
        world = new(stopped)
        other_files()[what](world)
        text = world.ends_as(uninterrupted)
        assert "checkpoint-12" in text and "damaged" not in text, text


def test_half_written_and_damaged_at_once(
    ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result
) -> None:
    """A kill in the save after the one that is then damaged."""

    def check(write: int) -> None:
        with ledger.faults("a kill in a save, then a damaged checkpoint", 2):
            world = new(stopped)
            world.run(code=-9, fault={"do": "kill", "save": 16, "write": write})
            bit_flipped(world.out / "checkpoint-12" / FILES[write % 3])
            must_tell("set aside as checkpoint-12.corrupt" in world.ends_as(uninterrupted), "no warning")

    two_at_a_time([2, 6, 9, 12], check)
