"""The worlds that faults happen in, and the count of the faults."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.world import Result, Silent, World, patiently
from tests.toy import write_world

LIBRARIES = ("hfkit", "torch", "transformers", "accelerate", "safetensors")


class Ledger:
    """What became of every fault. Survived: told where it has to be, and the run ends as it would have without."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def faults(self, kind: str, count: int = 1) -> Iterator[None]:
        """The block checks that `count` faults are survived; if it fails, they are lost, or silent."""
        outcome = "lost"
        try:
            yield
            outcome = "survived"
        except Silent:
            outcome = "silent"
            raise
        finally:
            with self.lock:
                self.counts.setdefault(kind, Counter())[outcome] += count

    def write(self, path: Path) -> None:
        by_kind = {
            kind: {"tried": counts.total(), **{name: counts[name] for name in ("survived", "lost", "silent")}}
            for kind, counts in sorted(self.counts.items())
        }
        totals = {
            key: sum(counts[key] for counts in by_kind.values()) for key in ("tried", "survived", "lost", "silent")
        }
        versions = {"python": platform.python_version()} | {
            name: importlib.metadata.version(name) for name in LIBRARIES
        }
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        content = {**totals, "by_kind": by_kind, "versions": versions, "date": date}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_ledger = Ledger()


def pytest_sessionfinish() -> None:
    if (path := os.environ.get("HFKIT_FAULTS_JSON")) and _ledger.counts:
        _ledger.write(Path(path))


@pytest.fixture
def ledger() -> Ledger:
    return _ledger


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Recipes, data, tokenizer and tokens are made; nothing is trained. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("faults") / "base"
    folder.mkdir()
    world = World(write_world(folder))
    world.run(fault={"do": "kill", "forward": 1}, code=-signal.SIGKILL)
    shutil.rmtree(world.out)
    return world


@pytest.fixture(scope="session")
def uninterrupted(base: World) -> Result:
    world = base.copy(base.folder.parent / "uninterrupted")
    world.run()
    return world.result()


@pytest.fixture(scope="session")
def stopped(base: World) -> World:
    """Killed in step 15: checkpoints 8 and 12 are there. To be copied, not changed."""
    world = base.copy(base.folder.parent / "stopped")
    process = world.start(fault={"do": "wait", "forward": 15})
    process.is_at_marker()
    for _ in patiently(10):
        if world.steps() == [8, 12]:
            break
    process.end()
    assert world.steps() == [8, 12]
    return world


@pytest.fixture
def new(base: World, tmp_path: Path) -> Callable[..., World]:
    """Makes a copy of a world, by default of `base`."""
    lock, made = threading.Lock(), []

    def copy(of: World = base) -> World:
        with lock:
            made.append(of)
            number = len(made)
        return of.copy(tmp_path / f"world-{number}")

    return copy
