"""How many cores a process takes, and how its threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfkit.runtime import cores

ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /sys/fs/cgroup, on a machine of 8 cores; `membership` in it for /proc/self/cgroup."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "text, count", [("200000 100000\n", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)]
)
def test_the_quota_of_version_2_counts(groups: Path, text: str, count: int) -> None:
    write(groups / "membership", "0::/\n")
    write(groups / "cpu.max", text)
    assert cores.usable_cores() == count


def test_the_smallest_quota_around_a_process_counts(groups: Path) -> None:
    write(groups / "membership", "0::/jobs/mine\n")
    write(groups / "jobs/cpu.max", "300000 100000")
    write(groups / "jobs/mine/cpu.max", "max 100000")
    assert cores.usable_cores() == 3


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("quota, count", [("250000", 3), ("-1", 8)])
def test_the_quota_of_version_1_counts(groups: Path, mount: str, quota: str, count: int) -> None:
    """The path is the host's: in the container only the mount is there."""
    write(groups / "membership", f"5:memory:/docker/x\n4:{mount}:/docker/x\n0::/\n")
    write(groups / mount / "cpu.cfs_quota_us", quota)
    write(groups / mount / "cpu.cfs_period_us", "100000")
    assert cores.usable_cores() == count


def test_without_control_groups_the_affinity_counts(groups: Path) -> None:
    assert cores.usable_cores() == 8


def test_here_it_is_at_least_one_core_and_no_more_than_there_are() -> None:
    assert 1 <= cores.usable_cores() <= (ALL or 1)


@pytest.fixture
def environment(groups: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a process that has not loaded torch yet, on a machine of 8 cores."""
    values: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", values)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(cores, "PROCESSES", groups / "proc")
    return values


def openmp(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if "OMP" in name}


SPIN = {"GOMP_SPINCOUNT": str(cores.SPIN_COUNT)}
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}


def parent(groups: Path, environ: bytes = b"PATH=/bin\0", command: bytes = b"accelerate\0launch\0x.yaml\0") -> None:
    folder = groups / "proc" / str(os.getppid())
    folder.mkdir(parents=True)
    (folder / "environ").write_bytes(environ)
    (folder / "cmdline").write_bytes(command)


def test_what_the_user_left_open_is_set(environment: dict[str, str]) -> None:
    cores.set_openmp()
    assert openmp(environment) == {"OMP_NUM_THREADS": "8", **SPIN}


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_what_the_user_chose_is_obeyed(environment: dict[str, str], name: str, value: str) -> None:
    environment |= {"OMP_NUM_THREADS": "1", name: value}
    cores.set_openmp()
    assert openmp(environment) == {"OMP_NUM_THREADS": "1", name: value}


def test_a_process_that_has_torch_is_left_as_it_is(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    cores.set_openmp()
    assert openmp(environment) == {}


def test_processes_share_the_cores(environment: dict[str, str], groups: Path) -> None:
    parent(groups)
    environment |= {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    cores.set_openmp()
    assert environment["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    "value, environ, command, threads",
    [
        ("1", b"A=1\0", b"accelerate\0launch\0", "8"),
        ("4", b"A=1\0", b"accelerate\0launch\0--cpu\0", "8"),  # accelerate counts the host's cores
        ("1", b"A=1\0OMP_NUM_THREADS=1\0", b"accelerate\0launch\0", "1"),
        ("3", b"A=1\0", b"accelerate\0launch\0--num_cpu_threads_per_process=3\0", "3"),
        ("1", b"A=1\0", b"accelerate\0launch\0--num-cpu-threads-per-process\0001\0", "1"),
    ],
)
def test_a_launchers_default_is_told_from_the_users_number(
    environment: dict[str, str], groups: Path, value: str, environ: bytes, command: bytes, threads: str
) -> None:
    parent(groups, environ, command)
    environment |= LAUNCHED | {"OMP_NUM_THREADS": value}
    cores.set_openmp()
    assert environment["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("value, threads", [("1", "8"), ("3", "3")])
def test_where_the_parent_cannot_be_seen_1_is_the_launchers(
    environment: dict[str, str], value: str, threads: str
) -> None:
    environment |= LAUNCHED | {"OMP_NUM_THREADS": value}
    cores.set_openmp()
    assert environment["OMP_NUM_THREADS"] == threads


PROBE = """
import os
import subprocess
import sys
from hfkit.runtime import cores
cores.usable_cores = lambda: 6
cores.set_openmp()
os.write(1, f"threads {os.environ['OMP_NUM_THREADS']}\\n".encode())  # in one piece: two processes write
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux shows what a launcher was started with")
@pytest.mark.parametrize(
    "command, chosen, threads",
    [
        (["accelerate", "launch"], None, "6"),
        (["accelerate", "launch"], "1", "1"),
        (["torchrun", "--nproc_per_node", "2"], None, "3"),
    ],
)
def test_real_launchers(tmp_path: Path, command: list[str], chosen: str | None, threads: str) -> None:
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    variables |= {"OMP_NUM_THREADS": chosen} if chosen else {}
    done = subprocess.run([*command, str(tmp_path / "probe.py")], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    processes = 2 if "torchrun" in command else 1
    assert done.stdout.count(f"threads {threads}\n") == processes, done.stdout


def test_the_command_line_sets_it_and_the_library_does_not() -> None:
    show = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('GOMP_SPINCOUNT'))"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for code, told in (
        ("import hfkit, hfkit.cli, hfkit.recipe_hook, hfkit.stages.pretrain", "None None"),
        ("from hfkit.cli import main; main(['lineage', 'nowhere'])", f"{cores.usable_cores()} {cores.SPIN_COUNT}"),
    ):
        done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], env=variables, capture_output=True, text=True)
        assert done.stdout.strip() == told, done.stderr
