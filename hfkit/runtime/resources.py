"""What a run uses: memory, energy, and the machine it is on.

Nothing here fails a run, asks the network, or costs time: a thread runs only where codecarbon is installed.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfkit.artifacts.manifest import Json
from hfkit.runtime.cores import usable_cores

POWERCAP = Path("/sys/class/powercap")  # of Linux: what the processor's own counter (RAPL) says
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
JOULES_PER_KWH = 3.6e6
COUNTRY = "HFKIT_COUNTRY"  # ISO code of three letters, such as DEU: by its grid codecarbon knows the CO2


@contextlib.contextmanager
def metered() -> Iterator[Json]:
    """Fill a dictionary with what was used inside, at its end.

    Yields:
        A dictionary, then with `hardware` and, where they are known, `peak_memory_bytes`, `energy_kwh`, `co2_kg` and
        `energy_source`. The memory is that of the device: on a GPU what torch allocated there, on a CPU what this
        process held. Processes that it starts, such as those that measure models or compile, are not counted in the
        memory; the energy is that of the whole machine.
    """
    used: dict[str, Any] = {}
    tracker, counters = _started_tracker(), _counters()
    _forget_peak()
    try:
        yield used
    finally:
        with contextlib.suppress(Exception):
            used |= {"peak_memory_bytes": peak_memory()} if peak_memory() else {}
            used |= _energy(tracker, counters)
            used["hardware"] = hardware()


# ---- memory


def _forget_peak() -> None:
    """Let the peak begin now."""
    with contextlib.suppress(Exception):
        if _cuda() is not None:
            _cuda().reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # the system's own mark goes back to what is held now


def peak_memory() -> int | None:
    """Return the bytes at most since the meter began; where the system cannot begin anew, since the process did."""
    if _cuda() is not None:
        return _cuda().max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int | None:
    """Return the bytes that this process holds now."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    return None


def _cuda() -> Any:
    """Return `torch.cuda` where the run has it in use. What is not imported yet is not imported for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


# ---- the machine


def hardware() -> Json:
    """Return `processor`, `cores`, `memory_bytes` and, where torch sees any, `gpus`."""
    description: dict[str, Any] = {"processor": _processor(), "cores": usable_cores(), "memory_bytes": total_memory()}
    if _cuda() is not None:
        description["gpus"] = [_cuda().get_device_name(index) for index in range(_cuda().device_count())]
    return description


def total_memory() -> int | None:
    """Return the bytes of the machine, or of the container that the process is in."""
    sizes = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # "max" where there is no limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes, default=None)


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---- energy


def _started_tracker() -> Any:
    """Return codecarbon's tracker, offline, if it is installed."""
    with contextlib.suppress(Exception):
        import logging

        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        country = os.environ.get(COUNTRY)
        options = {"country_iso_code": country} if country else {}
        tracker = OfflineEmissionsTracker(
            save_to_file=False, log_level="critical", allow_multiple_runs=True, measure_power_secs=15, **options
        )
        tracker.start()
        return tracker
    return None


def _energy(tracker: Any, begun: dict[str, tuple[float, float]]) -> Json:
    if tracker is not None:
        with contextlib.suppress(Exception):
            emissions = tracker.stop()
            kwh = tracker.final_emissions_data.energy_consumed
            co2 = {"co2_kg": emissions} if os.environ.get(COUNTRY) else {}
            return {"energy_kwh": kwh, "energy_source": "codecarbon", **co2}
    joules, sources = 0.0, set()
    for name, (now, span) in _counters().items():
        if name in begun:
            difference = now - begun[name][0]
            joules += difference if difference >= 0 else difference + span  # it began again at 0
            sources.add("NVML" if name.startswith("gpu") else "RAPL")
    return {"energy_kwh": joules / JOULES_PER_KWH, "energy_source": " + ".join(sorted(sources))} if sources else {}


def _counters() -> dict[str, tuple[float, float]]:
    """Return the devices' own counters by name: joules, and at how many they begin again."""
    counters: dict[str, tuple[float, float]] = {}
    for package in sorted(POWERCAP.glob("intel-rapl:[0-9]")):  # the name is the same on AMD
        with contextlib.suppress(OSError, ValueError):
            now, span = (int((package / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj"))
            counters[package.name] = now, span
    if _cuda() is not None:
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                counters[f"gpu{index}"] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0
    return counters
