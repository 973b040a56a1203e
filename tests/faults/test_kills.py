"""kill -9, at any step and between any two writes: the same command goes on to the same result."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import Ledger
from tests.faults.world import HFKIT, Result, World, patiently, two_at_a_time

pytestmark = pytest.mark.faults
KILLED = -signal.SIGKILL
NewWorld = Callable[..., World]


def kill_at_a_random_step(world: World, rng: random.Random) -> bool:
    """Some steps after the newest checkpoint, at no certain place. Returns whether it came to that."""
    log = world.out / "metrics.jsonl"
    before = log.stat().st_ino if log.exists() else None
    target = max(world.steps(), default=0) + rng.randint(1, 7)
    process = world.start()
    for _ in patiently(60):
        if process.popen.poll() is not None:
            assert process.popen.returncode == 0, process.text
            return False
        if log.exists() and log.stat().st_ino != before and world.logged_step() >= target:
            break
    time.sleep(rng.random() * 0.05)
    process.popen.kill()
    process.wait()
    process.leaves_nothing()
    return True


def survive_random_kills(ledger: Ledger, new: NewWorld, expected: Result, kills: int, seed: int) -> None:
    rng, done = random.Random(seed), 0
    with ledger.faults("kill -9 at a random step", kills):
        while done < kills:
            world = new()
            while done < kills and kill_at_a_random_step(world, rng):
                world.check_committed()
                done += 1
            world.ends_as(expected)


@pytest.mark.quick
def test_killed_at_random_steps(ledger: Ledger, new: NewWorld, uninterrupted: Result) -> None:
    two_at_a_time([1, 2], lambda seed: survive_random_kills(ledger, new, uninterrupted, 2, seed))


def test_killed_at_twenty_random_steps(ledger: Ledger, new: NewWorld, uninterrupted: Result) -> None:
    two_at_a_time([3, 4], lambda seed: survive_random_kills(ledger, new, uninterrupted, 20, seed))


# ---- between any two writes


def writes_of(world: World, command: list[str] = HFKIT, **fault: Any) -> list[str]:
    """What a run writes inside a scope, one line a write."""
    listed = world.folder / "writes.txt"
    world.run(command=command, fault={"do": "list", "file": str(listed), **fault})
    return listed.read_text(encoding="utf-8").splitlines()


def test_the_places_to_kill_at_are_those_of_a_save(new: NewWorld, stopped: World) -> None:
    """The count is of what a save writes: each file, the description, the rename, and what is removed after it."""
    writes = "\n".join(writes_of(new(stopped), save=16))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert f"{name}\nhalf of" in writes, f"{name} is not among:\n{writes}"
    for what in ("os.mkdir", "progress_0.json", "trainer_state.json", "checkpoint.json", "checkpoint-16.partial\n"):
        assert what in writes, f"{what} is not among:\n{writes}"
    last = writes[writes.index("checkpoint.json") :]
    assert last.count("os.rename") >= 3 and last.count("os.remove") >= 8, f"no commit and rotation in:\n{last}"


def kill_in_save(ledger: Ledger, new: NewWorld, start: World, step: int, write: int, expected: Result) -> None:
    with ledger.faults(f"kill -9 at a write of a save, step {step}"):
        world = new(start)
        world.run(code=KILLED, fault={"do": "kill", "save": step, "write": write})
        world.check_committed()
        kept = set(world.steps())
        assert step == 4 or kept & {12, 16}, f"the checkpoint before is lost: {kept}"
        world.ends_as(expected)


@pytest.mark.quick
def test_killed_in_a_save(ledger: Ledger, new: NewWorld, stopped: World, uninterrupted: Result) -> None:
    two_at_a_time([5, 30], lambda write: kill_in_save(ledger, new, stopped, 16, write, uninterrupted))


@pytest.mark.parametrize("step", [4, 16], ids=["the first save", "a save with rotation"])
def test_killed_between_any_two_writes_of_a_save(
    ledger: Ledger, new: NewWorld, base: World, stopped: World, uninterrupted: Result, step: int
) -> None:
    start = base if step == 4 else stopped
    count = len(writes_of(new(start), save=step))
    assert count > 20
    places = range(1, count + 1)
    two_at_a_time(places, lambda write: kill_in_save(ledger, new, start, step, write, uninterrupted))


def kill_in_scope(ledger: Ledger, new: NewWorld, start: World, scope: str, write: int, expected: Result) -> None:
    with ledger.faults(f"kill -9 at a write of {scope.rpartition(':')[2]}"):
        world = new(start)
        world.run(code=KILLED, fault={"do": "kill", "scope": scope, "write": write})
        world.ends_as(expected)


@pytest.mark.parametrize(
    "scope", ["hfkit.training.saving:save", "hfkit.engine.runner:_finish", "hfkit.engine.runner:_start"]
)
def test_killed_between_any_two_writes_of_the_end(
    ledger: Ledger, new: NewWorld, base: World, stopped: World, uninterrupted: Result, scope: str
) -> None:
    start = base if scope.endswith("_start") else stopped
    count = len(writes_of(new(start), scope=scope))
    assert count >= 2
    chosen = sorted({1 + number * (count - 1) // 14 for number in range(15)})  # all, or 15 of many
    two_at_a_time(chosen, lambda write: kill_in_scope(ledger, new, start, scope, write, uninterrupted))


def test_killed_while_data_and_tokenizer_are_made(ledger: Ledger, new: NewWorld, base: World) -> None:
    """Folders of one process appear whole or not at all."""
    scope, command = "hfkit.engine.runner:_make", [*HFKIT[:-1], "recipes/tokenizer.yaml"]

    def unmade() -> World:
        world = new()
        shutil.rmtree(world.folder / "runs")
        world.settings, world.out = [], world.folder / "runs/tokenizer"
        return world

    def digests(world: World) -> list[str]:
        folders = [world.folder / "runs" / name for name in ("data", "tokenizer")]
        return [json.loads((folder / "hfkit.json").read_text(encoding="utf-8"))["digest"] for folder in folders]

    def check(write: int) -> None:
        with ledger.faults("kill -9 while data and tokenizer are made"):
            world = unmade()
            world.run(command=command, code=KILLED, fault={"do": "kill", "scope": scope, "write": write})
            for name in ("data", "tokenizer"):
                folder = world.folder / "runs" / name
                assert not folder.exists() or (folder / "hfkit.json").exists(), f"{folder} is there, but not whole"
            world.run(command=command)
            assert digests(world) == digests(base)
            left = [path.name for path in (world.folder / "runs").glob(".*.partial")]
            assert not left, f"left behind: {left}"

    count = len(writes_of(unmade(), command=command, scope=scope))
    assert count > 20
    two_at_a_time(range(1, count + 1), check)
