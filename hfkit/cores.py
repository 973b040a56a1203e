"""The cores that a process may keep busy, and how its threads wait for each other. Imports no library."""

import contextlib
import math
import os
from pathlib import Path

SPIN_COUNT = 2000
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return how many cores this process may keep busy: those of its affinity, within the CPU quota of its container.

    A machine of 64 cores runs a container that was given 2 of them; 64 threads there are slower than 2.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota() -> float:
    """Return the smallest CPU quota, in cores, of the control groups that hold this process; infinity without one."""
    quotas = [math.inf]
    with contextlib.suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                quotas += [_quota_v2(folder) for folder in _upwards(CGROUPS, path)]
            elif "cpu" in controllers.split(","):  # version 1, mounted as `cpu` or `cpu,cpuacct`
                quotas += [_quota_v1(folder) for folder in _upwards(CGROUPS / controllers, path)]
    return min(quotas)


def _upwards(mount: Path, path: str) -> list[Path]:
    """A group and those around it. In a container the path may be the host's, where only the mount itself is there."""
    group = mount / path.strip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]


def _quota_v2(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return math.inf


def _quota_v1(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        if quota > 0:  # -1 where there is no limit
            return quota / int((folder / "cpu.cfs_period_us").read_text())
    return math.inf
