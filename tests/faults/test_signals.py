"""SIGTERM and SIGINT at any place, to the process or its launcher: a committed checkpoint, code 75, nobody left."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import Ledger
from tests.faults.world import HFKIT, LAUNCH, TORCHRUN, Process, Result, World, must_tell, two_at_a_time

pytestmark = pytest.mark.faults
NewWorld = Callable[..., World]
STOPPED = 75
PLACES: dict[str, dict[str, Any]] = {
    "forward": {"forward": 7},
    "first step": {"forward": 1},
    "last step": {"forward": 20},
    "save": {"save": 8, "write": 10},
    "commit": {"save": 8, "write": 26},
    "first save": {"save": 4, "write": 10},
    "evaluation": {"evaluation": 10},
    "evaluation of the last step": {"evaluation": 20},
}
STEP = {
    "forward": 7,
    "first step": 1,
    "last step": 20,
    "evaluation": 10,
    "evaluation of the last step": 20,
}


def stopped_at(world: World, place: str, *signals: int, command: list[str] = HFKIT, rank: int = 0) -> Process:
    """Start, wait until the process is at the place, and send it signals."""
    process = world.start(command=command, fault={"do": "wait", "rank": rank, **PLACES[place]})
    pid = process.is_at_marker()
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.1)
    process.marker.unlink()
    return process


def has_said(text: str, name: str, step: int | None) -> None:
    must_tell(f"stopped by {name}" in text, f"{name} is not told:\n{text}")
    must_tell("rerun the same command to resume" in text, text)
    if step is not None:
        must_tell(f"the checkpoint of step {step} is committed" in text, f"step {step} is not told:\n{text}")


def left_to_go_on(world: World, place: str) -> None:
    assert not (world.out / "hfkit.json").exists(), "a stopped run must not look finished"
    world.check_committed()
    if place in STEP:
        assert max(world.steps()) == STEP[place], f"no checkpoint of the step it was stopped in: {world.steps()}"
    assert world.steps(), "no checkpoint"


def survive_alone(ledger: Ledger, new: NewWorld, expected: Result, place: str, name: str, signals: list[int]) -> None:
    with ledger.faults(f"{name}, in {place}"):
        world = new()
        process = stopped_at(world, place, *signals)
        code, text = process.wait(), process.text
        must_tell(code == STOPPED, f"exit code {code} instead of {STOPPED}:\n{text}")
        has_said(text, signal.Signals(signals[0]).name, STEP.get(place))
        assert "Traceback" not in text, text
        process.leaves_nothing()
        left_to_go_on(world, place)
        world.ends_as(expected)


TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


@pytest.mark.quick
def test_sigterm_and_a_second_signal(ledger: Ledger, new: NewWorld, uninterrupted: Result) -> None:
    cases = [("forward", "SIGTERM", [TERM]), ("save", "SIGTERM, SIGINT, SIGTERM", [TERM, INT, TERM])]
    two_at_a_time(cases, lambda case: survive_alone(ledger, new, uninterrupted, *case))


@pytest.mark.parametrize(
    "signals",
    [[TERM], [INT], [TERM, TERM, INT]],
    ids=lambda numbers: "-".join(signal.Signals(n).name for n in numbers),
)
def test_signals_at_every_place(
    ledger: Ledger, new: NewWorld, uninterrupted: Result, signals: list[signal.Signals]
) -> None:
    name = ", ".join(each.name for each in signals)
    two_at_a_time(PLACES, lambda place: survive_alone(ledger, new, uninterrupted, place, name, signals))


def test_sigterm_then_sigkill(ledger: Ledger, new: NewWorld, uninterrupted: Result) -> None:
    def check(place: str) -> None:
        with ledger.faults(f"SIGTERM, SIGKILL in {place}"):
            world = new()
            process = stopped_at(world, place, TERM, KILL)
            assert process.wait() == -KILL, process.text
            process.leaves_nothing()
            assert not world.is_finished()
            world.check_committed()
            world.ends_as(uninterrupted)

    two_at_a_time(["forward", "save", "commit", "evaluation", "last step"], check)


def survive_launched(ledger: Ledger, new: NewWorld, expected: Result, case: tuple[str, str, list[int]]) -> None:
    """`accelerate launch`, one process: signals to it, or to the process that it has started."""
    target, place, signals = case
    name = ", ".join(signal.Signals(number).name for number in signals)
    with ledger.faults(f"accelerate launch: {name} to the {target}, in {place}"):
        world = new()
        process = world.start(command=LAUNCH, fault={"do": "wait", **PLACES[place]})
        pid = process.is_at_marker()
        assert pid != process.popen.pid, "no launcher to speak of"
        for number in signals:
            os.kill(pid if target == "child" else process.popen.pid, number)
        if target == "launcher":
            time.sleep(1.5)  # the child sees once a second whether its launcher is there
        process.marker.unlink()
        process.leaves_nothing(10)
        code, text = process.wait(), process.text
        must_tell(code != 0, f"exit code 0 where work is missing:\n{text}")
        has_said(text, "SIGTERM", STEP.get(place))
        left_to_go_on(world, place)
        world.ends_as(expected, command=LAUNCH)


@pytest.mark.quick
def test_sigkill_of_the_launcher(ledger: Ledger, new: NewWorld, uninterrupted: Result) -> None:
    survive_launched(ledger, new, uninterrupted, ("launcher", "forward", [KILL]))


def test_signals_under_accelerate_launch(ledger: Ledger, new: NewWorld, uninterrupted: Result) -> None:
    places = ("forward", "save", "evaluation")
    cases = [("child", place, [TERM]) for place in places]
    cases += [("launcher", place, [number]) for place in places for number in (TERM, KILL)]
    two_at_a_time(cases, lambda case: survive_launched(ledger, new, uninterrupted, case))


@pytest.fixture(scope="module")
def on_two_ranks(base: World) -> Result:
    world = base.copy(base.folder.parent / "two-ranks")
    world.run(command=TORCHRUN)
    return world.result()


TORCHRUN_CASES = [
    *((target, place, TERM) for target in ("rank 0", "rank 1", "launcher") for place in ("forward", "evaluation")),
    ("rank 0", "save", TERM),
    ("launcher", "save", TERM),
    ("launcher", "forward", INT),
    ("launcher", "forward", KILL),
    ("launcher", "save", KILL),
    ("rank 0", "forward", KILL),
    ("rank 1", "forward", KILL),
    ("rank 1", "save", KILL),
]


@pytest.mark.parametrize("case", TORCHRUN_CASES, ids=lambda case: f"{case[2].name} to {case[0]} in {case[1]}")
def test_signals_under_torchrun(
    ledger: Ledger, new: NewWorld, on_two_ranks: Result, case: tuple[str, str, signal.Signals]
) -> None:
    target, place, number = case
    with ledger.faults(f"torchrun, 2 ranks: {number.name} to {target}, in {place}"):
        world = new()
        rank = 1 if target == "rank 1" and place != "save" else 0
        process = world.start(command=TORCHRUN, fault={"do": "wait", "rank": rank, **PLACES[place]})
        pid = process.is_at_marker()
        if target == "rank 1" and rank == 0:
            pid = other_rank(process, pid)
        os.kill(process.popen.pid if target == "launcher" else pid, number)
        time.sleep(1.5 if number == KILL else 0.3)
        process.marker.unlink(missing_ok=True)
        process.leaves_nothing(10)
        code, text = process.wait(), process.text
        must_tell(code != 0, f"exit code 0 where work is missing:\n{text}")
        assert not (world.out / "hfkit.json").exists()
        world.check_committed()
        if number != KILL:  # a killed torchrun takes the store with it that the ranks need to commit together
            left_to_go_on(world, place)
            must_tell("is committed" in text or place not in STEP, f"no checkpoint is told:\n{text}")
        world.ends_as(on_two_ranks, command=TORCHRUN)


def other_rank(process: Process, pid: int) -> int:
    for other in process.alive():
        with open(f"/proc/{other}/environ", "rb") as file:
            if b"\0RANK=1\0" in file.read():
                return other
    raise AssertionError(f"no other rank than {pid}")
