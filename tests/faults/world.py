"""A toy run as a folder and a command: started with a fault, killed, watched, and held against one without."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

INJECT = str(Path(__file__).parent / "inject")
PRETRAIN = "recipes/pretrain.yaml"
HFKIT = [sys.executable, "-m", "hfkit", "run", PRETRAIN]
LAUNCH = ["accelerate", "launch", PRETRAIN]
TORCHRUN = ["torchrun", "--nproc_per_node", "2", PRETRAIN, "train.use_cpu=true"]
SETTINGS = [
    "train.max_steps=20",
    "train.save_steps=4",
    "train.eval_strategy=steps",
    "train.eval_steps=10",
    "model.attention_dropout=0.1",
    "train.gradient_accumulation_steps=2",
]
SECONDS = 240.0  # no command here takes as long
_numbers = itertools.count()


class Silent(AssertionError):
    """A fault did harm, or went by, and nobody was told."""


def must_tell(is_told: bool, problem: str) -> None:
    if not is_told:
        raise Silent(problem)


class Result(NamedTuple):
    """What a fault must not change."""

    model: str  # SHA-256
    lines: list[tuple[Any, ...]]  # step, loss, grad_norm, eval_loss of every line of the log


class Process:
    """One command under way. It and all its children carry a mark in their environment."""

    def __init__(self, folder: Path, command: list[str], fault: dict[str, Any] | None):
        self.mark = uuid.uuid4().hex
        self.log = folder / f"log-{next(_numbers)}.txt"
        self.marker = folder / f"here-{self.mark}"
        # Idle threads that spin take the time of the other processes.
        environment = {**os.environ, "HFKIT_FAULT_MARK": self.mark, "OMP_WAIT_POLICY": "passive"}
        if fault is not None:
            fault = {"file": str(self.marker), **fault}
            path = os.pathsep.join(filter(None, [INJECT, os.environ.get("PYTHONPATH")]))
            environment |= {"HFKIT_FAULT": json.dumps(fault), "PYTHONPATH": path}
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> int:
        try:
            return self.popen.wait(SECONDS)
        finally:
            if self.popen.returncode is None:
                self.end()

    def is_at_marker(self) -> int:
        """Wait until the injected fault says that it is there. Returns the process id of the one that is."""
        for _ in patiently(SECONDS):
            if self.marker.exists():
                return int(self.marker.read_text())
            assert self.popen.poll() is None, f"ended before the place of the fault:\n{self.text}"
        raise AssertionError(f"never came to the place of the fault:\n{self.text}")

    def alive(self) -> list[int]:
        """The processes that this command has started and that are still there."""
        mark = f"HFKIT_FAULT_MARK={self.mark}".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_zombie = (place / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if mark in (place / "environ").read_bytes() and not is_zombie:
                    found.append(int(place.name))
        return found

    def leaves_nothing(self, seconds: float = 10) -> None:
        for _ in patiently(seconds):
            if not self.alive():
                return
        raise AssertionError(f"after {seconds} s these processes are still there: {self.alive()}\n{self.text}")

    def end(self) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()


class World:
    """A folder with recipes and made inputs, and the run in it."""

    def __init__(self, folder: Path, out: str = "runs/pretrain", settings: list[str] = SETTINGS):
        self.folder, self.settings = folder, settings
        self.out = folder / out

    def copy(self, folder: Path) -> "World":
        shutil.copytree(self.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("log-*", "here-*"))
        return World(folder, self.out.relative_to(self.folder).as_posix(), self.settings)

    def start(self, *more: str, command: list[str] = HFKIT, fault: dict[str, Any] | None = None) -> Process:
        place = [f"output_dir={self.out.relative_to(self.folder)}"]
        return Process(self.folder, [*command, *self.settings, *place, *more], fault)

    def run(
        self, *more: str, code: int | None = 0, command: list[str] = HFKIT, fault: dict[str, Any] | None = None
    ) -> str:
        """Run the command to its end, which must be with exit code `code`. Returns all it said."""
        process = self.start(*more, command=command, fault=fault)
        ended = process.wait()
        assert code is None or ended == code, f"exit code {ended} instead of {code}:\n{process.text}"
        return process.text

    def result(self) -> Result:
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        keys = ("step", "loss", "grad_norm", "eval_loss")
        kept = [tuple(line.get(key) for key in keys) for line in lines if "loss" in line or "eval_loss" in line]
        return Result(sha256(self.out / "model.safetensors"), kept)

    def ends_as(self, expected: Result, command: list[str] = HFKIT) -> str:
        """Go on, and hold the finished folder against that of an uninterrupted run."""
        text = self.run(command=command)
        assert self.is_finished(), f"exit code 0, but {self.out} is not finished:\n{text}"
        left = [path.name for path in self.out.iterdir() if path.name.startswith((".", "hfkit.started"))]
        assert not left, f"left behind: {left}"
        assert self.result() == expected, f"the result is another than without the fault:\n{text}"
        return text

    def is_finished(self) -> bool:
        return (self.out / "hfkit.json").exists() and (self.out / "model.safetensors").exists()

    def steps(self) -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in self.out.glob("checkpoint-*") if path.suffix == "")

    def logged_step(self) -> int:
        try:
            lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return 0
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def check_committed(self) -> None:
        """Every folder that has the name of a checkpoint is whole by its own description."""
        for step in self.steps():
            folder = self.out / f"checkpoint-{step}"
            description = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
            assert description["step"] == step
            there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            assert there == {*description["files"], "checkpoint.json"}, f"{folder}: {there}"
            for name, entry in description["files"].items():
                assert sha256(folder / name) == entry["sha256"], f"{folder / name} is not what was described"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def patiently(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.01)


def two_at_a_time(cases: Iterable[Any], check: Callable[[Any], None]) -> None:
    """Check every case, two at once, each on a core of its own; then fail with all that failed."""
    cores = sorted(os.sched_getaffinity(0))
    turn = itertools.count()
    mine = threading.local()

    def pin() -> None:
        mine.core = cores[next(turn) % len(cores)]
        os.sched_setaffinity(0, {mine.core})  # of this thread and the processes that it starts

    def tried(case: Any) -> str | None:
        try:
            check(case)
        except Exception as error:
            return f"---- {case}\n{type(error).__name__}: {error}"
        return None

    with concurrent.futures.ThreadPoolExecutor(2, initializer=pin) as pool:
        problems = list(filter(None, pool.map(tried, cases)))
    assert not problems, f"{len(problems)} cases failed:\n" + "\n".join(problems)
