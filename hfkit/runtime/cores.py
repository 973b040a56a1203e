"""The cores that a process may keep busy, and how its threads wait for each other. Imports no library."""

import contextlib
import math
import os
import sys
from pathlib import Path

# How often a thread that waits looks again before it sleeps, of libgomp, which torch has on Linux. Its own 300,000 are
# some 10 ms: where another process wants the core, the thread that all wait for does not run in that time. None at all
# make each wait a system call. `benchmarks/busy.py` measures both.
SPIN_COUNT = 2_000
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what `accelerate launch` and torchrun set
PROCESSES = Path("/proc")
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def set_openmp() -> None:
    """Set in the environment, where the user has not, how many threads OpenMP starts and how they wait.

    OpenMP reads it once, when torch loads; a process that has torch is left as it is. Only the command line calls
    this, and what it starts inherits it: as a library, hfkit leaves the environment alone.
    """
    if "torch" in sys.modules:
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    if not _is_chosen_by_user():
        share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, share))


def _is_chosen_by_user() -> bool:
    """Return whether OMP_NUM_THREADS is the user's: `accelerate launch` and torchrun set it where nobody did, mostly
    to 1.

    The launcher is the parent, and the environment that itself was started with tells. Where the system does not show
    it, 1 is taken for the launcher's.
    """
    if "OMP_NUM_THREADS" not in os.environ or not any(name in os.environ for name in LAUNCHED):
        return "OMP_NUM_THREADS" in os.environ
    parent = PROCESSES / str(os.getppid())
    try:
        environment, command = (parent / "environ").read_bytes(), (parent / "cmdline").read_bytes()
    except OSError:
        return os.environ["OMP_NUM_THREADS"] != "1"
    is_set = any(line.startswith(b"OMP_NUM_THREADS=") for line in environment.split(b"\0"))
    return is_set or b"__num_cpu_threads_per_process" in command.replace(b"-", b"_")


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
    """Return a group and those around it. In a container the path may be the host's, where only the mount itself is
    there."""
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
