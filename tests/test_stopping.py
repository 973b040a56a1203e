"""Signals: at once where nothing can be lost, noted where something can. And whether a stopped run may go on."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.engine import graph, states
from hfkit.errors import HfkitError
from hfkit.runtime import signals
from hfkit.training import checkpoints
from hfkit.training.callbacks import MetricsFile
from tests.interrupting import interrupted, kill, quick_world, result, run, terminate

BOTH = [signal.SIGTERM, signal.SIGINT]
LAUNCHERS = ["TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    yield


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_ends_at_once_where_nothing_can_be_lost(number: signal.Signals) -> None:
    before = handlers()
    with pytest.raises(signals.Stopped, match=number.name), signals.handled():
        assert signals.requested() is None
        send(number)
        pytest.fail("it went on")
    assert handlers() == before


def test_the_handlers_are_those_of_before_also_after_a_failure() -> None:
    before = handlers()
    with signals.handled():
        assert not set(map(id, handlers())) & set(map(id, before))
    assert handlers() == before
    with pytest.raises(KeyError), signals.handled():
        raise KeyError
    assert handlers() == before


@pytest.mark.parametrize("number", BOTH)
def test_in_training_a_signal_is_noted_and_a_second_one_is_harmless(number: signal.Signals) -> None:
    """The first one is the one that is told; at the end of the patience the run ends."""
    done = []
    with pytest.raises(signals.Stopped, match=f"^{number.name}$"), signals.handled(), signals.patient():
        send(number)
        assert signals.requested() == number.name
        for again in (number, *BOTH):
            send(again)
        assert signals.requested() == number.name
        done.append("all of it")
    assert done == ["all of it"]


def test_patience_without_a_signal_changes_nothing() -> None:
    with signals.handled():
        with signals.patient():
            pass
        with pytest.raises(signals.Stopped):  # and it ends with its block
            send(signal.SIGTERM)


def test_patience_does_not_hide_what_went_wrong_inside() -> None:
    with pytest.raises(KeyError), signals.handled(), signals.patient():
        send(signal.SIGTERM)
        raise KeyError
    with pytest.raises(signals.Stopped), signals.handled():  # the patience ended with the failure
        send(signal.SIGTERM)


def test_a_second_signal_does_not_disturb_the_cleaning_up() -> None:
    cleaned = []
    with pytest.raises(signals.Stopped), signals.handled():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            send(signal.SIGINT)
            cleaned.append(True)
    assert cleaned


def test_no_library_takes_it_for_a_failure_of_its_own() -> None:
    assert not issubclass(signals.Stopped, Exception)
    with pytest.raises(signals.Stopped), signals.handled(), contextlib.suppress(Exception):
        send(signal.SIGTERM)


def test_a_signal_of_the_last_run_does_not_stop_the_next() -> None:
    with pytest.raises(signals.Stopped), signals.handled():
        send(signal.SIGTERM)
    with signals.handled(), signals.patient():
        assert signals.requested() is None


def test_a_signal_of_the_last_run_does_not_stop_a_training_of_ones_own() -> None:
    """In a notebook: the command was stopped, and then a trainer is used without it."""
    with pytest.raises(signals.Stopped), signals.handled():
        send(signal.SIGTERM)
    with signals.patient():
        assert signals.requested() is None


def test_another_thread_works_without_handlers() -> None:
    """As a server or a notebook may call it: Python gives signals to the main thread only."""
    before, seen = handlers(), list[object]()

    def work() -> None:
        with signals.handled(), signals.patient():
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", BOTH)
def test_the_command_line_tells_and_returns_75(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(cli, "_do", lambda options, overrides: send(number))
    assert cli.main(["plan", "recipes/x.yaml"]) == signals.EXIT_CODE == 75
    assert capsys.readouterr().err == f"error: stopped by {number.name}; rerun the same command to resume\n"


# ---- the launcher

CHILD = """
import sys, time
from hfkit.runtime import signals
try:
    with signals.handled():
        print("ready", flush=True)
        for _ in range(200):
            time.sleep(0.1)
except signals.Stopped as error:
    print(f"stopped by {error}", flush=True)
"""
# A launcher that starts the child, waits until it is ready, and dies as a killed one does.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.pid, flush=True)
log = os.fork()
if log == 0:
    print(child.stdout.read().strip(), flush=True)  # what the child says after its parent is gone
os._exit(1)
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs: a zombie that nobody waits for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("launcher", [*LAUNCHERS, None])
def test_a_process_ends_with_its_launcher(launcher: str | None) -> None:
    """A killed launcher cannot pass a signal on. Where there is none, a closed terminal ends nothing."""
    environment = {**os.environ, **({launcher: "x"} if launcher else {})}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), CHILD], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    word, pid = parent.stdout.readline().split()
    assert word == "ready"
    end = time.monotonic() + (5.0 if launcher else 2.5 * signals.PARENT_POLL_SECONDS)
    try:
        while is_alive(int(pid)) and time.monotonic() < end:
            time.sleep(0.05)
        assert is_alive(int(pid)) == (launcher is None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        said = parent.stdout.read()
        parent.wait()
    assert ("stopped by SIGTERM" in said) == (launcher is not None)


# ---- the folder of a run


def test_a_folder_with_leftovers_only_is_absent(ready: Path) -> None:
    folder = Path("runs/pretrain")
    (folder / ".checkpoint-5.partial").mkdir(parents=True)
    (folder / ".hfkit.started.json.abcdefgh.partial").write_text("{", encoding="utf-8")
    node = graph.resolve(Path("recipes/pretrain.yaml"))
    assert states.state_of(node) == ("absent", [])
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(HfkitError, match="holds files that hfkit did not make"):
        states.state_of(node)


def test_a_tidying_that_was_killed_is_done_at_the_next_run(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=1"]) == 0
    folder = Path("runs/pretrain")
    before = {path.name for path in folder.iterdir()}
    content = json.loads((folder / "hfkit.json").read_text(encoding="utf-8"))
    manifest.write_json(folder / manifest.STARTED, {**content, "committed": True})
    for name in ("checkpoint-1", "checkpoint-2.corrupt", ".checkpoint-1.old.partial"):
        (folder / name).mkdir()
        (folder / name / "optimizer.pt").write_bytes(b"moments")
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=1"]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == before


# ---- a run that is not the same any more

NINE = ["sequence_length=128", "train.per_device_train_batch_size=24", "train.max_steps=9", "train.save_steps=2"]
CHANGED = [*NINE, "train.learning_rate=5e-3", "train.weight_decay=0.2", "train.logging_steps=2"]


@pytest.fixture(scope="module")
def stopped(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was stopped at step 5, and other inputs. To be copied."""
    with quick_world(made, tmp_path_factory.mktemp("stopped") / "world") as folder:
        interrupted(*NINE, output="stopped", event="on_step_begin", step=5, act=terminate)
        assert cli.main(["run", "recipes/data.yaml", "split.test=0.2", "output_dir=runs/other-data"]) == 0
        assert cli.main(["run", "recipes/tokenizer.yaml", "vocab_size=300", "output_dir=runs/other-tokenizer"]) == 0
        yield folder


@pytest.fixture
def begun(stopped: Path, request: pytest.FixtureRequest) -> str:
    """A copy of the stopped run, to be gone on with."""
    name = f"begun-{abs(hash(request.node.name))}"
    shutil.copytree("runs/stopped", f"runs/{name}")
    return name


def content(folder: str) -> dict[str, tuple[int, str]]:
    paths = [path for path in Path(f"runs/{folder}").rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, manifest.sha256_of(path)) for path in paths}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("train.learning_rate=5e-3", "train.learning_rate: 0.01 -> 0.005"),
        ("train.per_device_train_batch_size=12", "train.per_device_train_batch_size: 24 -> 12"),
        ("optimizer=muon", "optimizer: default -> muon"),
        ("data=runs/other-data", "data: made from something else now"),
        ("tokenizer=runs/other-tokenizer", "tokenizer: made from something else now"),
    ],
)
def test_a_changed_run_is_refused(
    begun: str, capsys: pytest.CaptureFixture[str], change: str, difference: str
) -> None:
    before = content(begun)
    assert run(*NINE, change, output=begun) == 2
    said = capsys.readouterr().err
    assert f"runs/{begun}: was made from a different recipe than recipes/pretrain.yaml is now:" in said
    assert f":\n    {difference}\n  Nothing was changed. Options:\n" in said
    assert "--force  to resume from its checkpoints anyway\n" in said
    assert f"--fresh  to set runs/{begun} aside as runs/{begun}.old1 and start over\n" in said
    assert content(begun) == before


def test_fresh_sets_the_old_run_aside_and_begins_anew(begun: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(digest for _, digest in content(begun).values())
    assert run(*NINE, "--fresh", output=begun) == 0
    said = capsys.readouterr().out
    assert f"the old runs/{begun} is kept as runs/{begun}.old1" in said and "resuming from" not in said
    assert sorted(digest for _, digest in content(f"{begun}.old1").values()) == before
    assert [line["step"] for line in result(begun)["log"]] == list(range(1, 10))


@pytest.fixture(scope="module")
def forced(stopped: Path) -> dict[str, Any]:
    """A run gone on with a changed recipe: its log, and the settings that the optimizer ended with."""
    groups: list[dict[str, Any]] = []
    shutil.copytree("runs/stopped", "runs/forced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "on_train_end", lambda *a, **k: groups.extend(k["optimizer"].param_groups))
        assert run(*CHANGED, "--force", output="forced") == 0
    return {**result("forced"), "groups": groups}


def test_force_goes_on_from_the_checkpoint(forced: dict[str, Any]) -> None:
    log = forced["log"]
    assert [line["step"] for line in log[:5]] == [1, 2, 3, 4, 5] and all("loss" in line for line in log)
    assert log[0]["learning_rate"] == 0.01, "the steps before the change are as they were"


def test_force_takes_the_learning_rate_of_the_recipe(forced: dict[str, Any]) -> None:
    rates = {line["step"]: line["learning_rate"] for line in forced["log"]}
    assert rates[6] == pytest.approx(5e-3 * 4 / 9) and rates[8] == pytest.approx(5e-3 * 2 / 9)


def test_force_takes_the_weight_decay_of_the_recipe(forced: dict[str, Any]) -> None:
    assert {group["weight_decay"] for group in forced["groups"]} == {0.0, 0.2}


def test_force_takes_the_logging_steps_of_the_recipe(forced: dict[str, Any]) -> None:
    assert [line["step"] for line in forced["log"] if line["step"] > 5] == [6, 8]


def test_a_forced_run_is_interrupted_and_goes_on_as_any_other(begun: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoint is of before the change until it commits one of its own; the old recipe is refused from then."""
    interrupted(*CHANGED, "--force", output=begun, event="on_step_end", step=6, act=kill)
    assert list(checkpoints.committed(Path(f"runs/{begun}")))[-1] == 5
    capsys.readouterr()
    interrupted(*CHANGED, output=begun, event="on_step_begin", step=7, act=terminate)
    assert f"resuming from runs/{begun}/checkpoint-5" in capsys.readouterr().out
    assert run(*NINE, output=begun) == 2
    assert "train.learning_rate: 0.005 -> 0.01" in capsys.readouterr().err
    assert run(*CHANGED, output=begun) == 0
    assert f"resuming from runs/{begun}/checkpoint-7" in capsys.readouterr().out
