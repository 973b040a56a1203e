"""How many cores a process takes."""

import os
from pathlib import Path

import pytest

from hfkit import cores

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
