"""A file system that fills up: told, nothing committed is lost, and with room again the run ends as it should."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Ledger
from tests.faults.world import Result, World, must_tell, patiently

pytestmark = pytest.mark.faults
NewWorld = Callable[..., World]
WARNING = "was not written: "


@pytest.fixture
def small(base: World, tmp_path: Path) -> Iterator[Callable[[str], World]]:
    """Makes a world whose runs are written to a tmpfs of a given size."""
    mounted: list[Path] = []

    def make(size: str) -> World:
        world = base.copy(tmp_path / f"world-{len(mounted)}")
        world.out = world.folder / "small/pretrain"
        disk = world.folder / "small"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if done.returncode:
            pytest.skip(f"mount is not permitted here: {done.stderr.decode().strip()}")
        mounted.append(disk)
        return world

    yield make
    for disk in mounted:
        subprocess.run(["umount", "--lazy", disk], check=True)


def remount(world: World, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", world.out.parent], check=True)


def goes_on(world: World, expected: Result) -> None:
    """After a run on a full disk: what is there is whole, and with more room the same command ends as it should."""
    world.check_committed()
    (world.out.parent / "filler").unlink(missing_ok=True)
    remount(world, "64m")
    if world.is_finished():
        assert world.result() == expected
    world.ends_as(expected)


def ended_well_or_explained(world: World, code: int, text: str) -> None:
    """Exit code 0 only with a finished folder; 2 with an explanation."""
    must_tell(code in (0, 2), f"exit code {code}:\n{text}")
    must_tell(world.is_finished() == (code == 0), f"exit code {code}, but finished: {world.is_finished()}\n{text}")
    must_tell("Traceback" not in text, text)
    if code == 2:
        must_tell("error: " in text and "make room" in text, text)


@pytest.mark.parametrize("size", ["2200k", "2600k", "3000k", "3600k"])
def test_too_small_from_the_start(
    ledger: Ledger, small: Callable[[str], World], uninterrupted: Result, size: str
) -> None:
    """There is room for the first checkpoint and not for all the others."""
    world = small(size)
    with ledger.faults("a disk too small from the start"):
        process = world.start()
        code, text = process.wait(), process.text
        ended_well_or_explained(world, code, text)
        must_tell(WARNING in text or size != "2200k", f"no warning:\n{text}")
        goes_on(world, uninterrupted)


def test_too_small_for_anything(ledger: Ledger, small: Callable[[str], World], uninterrupted: Result) -> None:
    world = small("1m")
    with ledger.faults("a disk too small for anything"):
        text = world.run(code=2)
        must_tell("MB are free" in text and "are needed; make room or choose another" in text, text)
        assert not world.out.exists()
        goes_on(world, uninterrupted)


def fill_and_free(ledger: Ledger, world: World, expected: Result, fault: dict[str, object]) -> str:
    filler = world.out.parent / "filler"
    with ledger.faults("a disk that another file fills"):
        process = world.start(fault={"do": "fill", "file": str(filler), **fault})
        code, text = process.wait(), process.text
        assert filler.exists(), f"the disk was never filled:\n{text}"
        ended_well_or_explained(world, code, text)
        must_tell(WARNING in text or code == 2, f"no warning:\n{text}")
        goes_on(world, expected)
    return text


@pytest.mark.quick
def test_filled_between_checkpoints(ledger: Ledger, small: Callable[[str], World], uninterrupted: Result) -> None:
    world = small("8m")
    first = str(world.out / "checkpoint-4")  # it is committed in the background, at its own pace
    text = fill_and_free(ledger, world, uninterrupted, {"forward": 7, "after": first})
    must_tell("MB are free" in text and "checkpoint-4 is untouched" in text, text)


@pytest.mark.parametrize("step", [2, 5, 18, 20])
def test_filled_at_a_step(ledger: Ledger, small: Callable[[str], World], uninterrupted: Result, step: int) -> None:
    fill_and_free(ledger, small("8m"), uninterrupted, {"forward": step})


@pytest.mark.parametrize("write", range(1, 24, 2))
def test_filled_in_a_save(ledger: Ledger, small: Callable[[str], World], uninterrupted: Result, write: int) -> None:
    """The room was there when it was looked for."""
    fill_and_free(ledger, small("8m"), uninterrupted, {"save": 8, "write": write})


@pytest.mark.parametrize("scope", ["hfkit.training.saving:save", "hfkit.engine.runner:_finish"])
@pytest.mark.parametrize("write", [1, 3, 5])
def test_filled_at_the_end(
    ledger: Ledger, small: Callable[[str], World], uninterrupted: Result, scope: str, write: int
) -> None:
    fill_and_free(ledger, small("8m"), uninterrupted, {"scope": scope, "write": write})


def test_filled_and_freed_in_one_run(ledger: Ledger, small: Callable[[str], World], uninterrupted: Result) -> None:
    """The log waits in memory, and checkpoints are written again as soon as there is room."""
    world = small("8m")
    filler = world.out.parent / "filler"
    with ledger.faults("a disk that another file fills, and is freed"):
        process = world.start(fault={"do": "wait", "forward": 7})
        process.is_at_marker()
        room = os.statvfs(filler.parent)
        filler.write_bytes(bytes(room.f_bavail * room.f_bsize))
        process.marker.unlink()
        for _ in patiently(60):
            if WARNING in process.text or process.popen.poll() is not None:
                break
        filler.unlink()
        assert process.wait() == 0, process.text
        must_tell(WARNING in process.text, process.text)
        assert world.result() == uninterrupted
