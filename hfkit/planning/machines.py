"""Machines by name with their published numbers, what they cost, and how Accelerate spreads a training over one."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from hfkit.artifacts.manifest import Json
from hfkit.errors import HfkitError, did_you_mean
from hfkit.runtime.cores import usable_cores
from hfkit.runtime.resources import total_memory


@dataclasses.dataclass(frozen=True)
class Machine:
    """Equal devices.

    Args:
        flops: peak of one, dense, in bf16, FLOP/s: published, or of this machine measured.
        memory: of one, bytes.
        bandwidth: of that memory, bytes a second.
        watts: of one.
        dollars_per_hour: of one; None where only the electricity is paid.
        is_here: whether it is the one that plans, whose speed is measured.
    """

    name: str
    count: int
    flops: float
    memory: float
    bandwidth: float
    watts: float
    dollars_per_hour: float | None
    is_here: bool = False
    is_cpu: bool = False


# TFLOP/s in bf16 without sparsity, GB, GB/s, watts, and about what one costs an hour in 2025, in dollars.
TABLE: dict[str, tuple[float, float, float, float, float]] = {
    "a100": (312, 80, 2039, 400, 1.8),  # NVIDIA A100 80GB SXM data sheet
    "h100": (989, 80, 3350, 700, 3.0),  # NVIDIA H100 SXM data sheet
    "h200": (989, 141, 4800, 700, 3.8),  # NVIDIA H200 SXM data sheet
    "b200": (2250, 180, 8000, 1000, 5.5),  # NVIDIA HGX B200 data sheet
    "l4": (121, 24, 300, 72, 0.7),  # NVIDIA L4 data sheet
    "l40s": (362, 48, 864, 350, 1.0),  # NVIDIA L40S data sheet
    "a10g": (70, 24, 600, 300, 1.0),  # NVIDIA A10G data sheet, as in AWS g5
    "t4": (65, 16, 320, 70, 0.35),  # NVIDIA T4 data sheet, fp16: it has no bf16
    "v100": (125, 32, 900, 300, 0.9),  # NVIDIA V100 SXM2 data sheet, fp16: it has no bf16
    "rtx3090": (71, 24, 936, 350, 0.25),  # NVIDIA GA102 white paper, sums in fp32
    "rtx4090": (165, 24, 1008, 450, 0.45),  # NVIDIA Ada white paper, sums in fp32
    "rtx5090": (209, 32, 1792, 575, 0.7),  # NVIDIA RTX Blackwell white paper, sums in fp32
    "mi300x": (1307, 192, 5300, 750, 3.0),  # AMD Instinct MI300X data sheet
    "cpu": (5, 128, 300, 250, 1.5),  # 32 cores of 2.5 GHz with two AVX-512 units each, in fp32
}
WITHOUT_BF16 = ("t4", "v100")
WATTS_A_CORE = 12.0  # of this machine's processor, memory and losses included
LIKE = {name.removeprefix("rtx"): name for name in TABLE if name != "cpu"}  # what torch's names of devices hold


@dataclasses.dataclass(frozen=True)
class Prices:
    """What is assumed where nothing can be measured. A `prices.yaml` here or in ~/.config/hfkit changes any of it."""

    dollars_per_hour: dict[str, float] = dataclasses.field(default_factory=dict)  # of one device; `here` is this one
    watts: dict[str, float] = dataclasses.field(default_factory=dict)  # of one device, or of this machine as a whole
    dollars_per_kwh: float = 0.20
    grams_per_kwh: float = 445.0  # of CO2: the world's mean in 2024 (IEA, Electricity 2025)
    utilisation: float = 0.35  # share of a named machine's peak that a training reaches
    source: str = "hfkit's own"


def prices() -> Prices:
    """
    Raises:
        HfkitError: for a file that says what is not asked.
    """
    known = {each.name: each.type for each in dataclasses.fields(Prices) if each.name != "source"}
    found: dict[str, Any] = {}
    for path in (Path.home() / ".config" / "hfkit" / "prices.yaml", Path("prices.yaml")):
        if not path.is_file():
            continue
        for key, value in _mapping(path).items():
            if key not in known:
                raise HfkitError(f"{path}: {key}: unknown key, {did_you_mean(str(key), known)}")
            numbers = value.values() if isinstance(value, dict) else [value]
            if isinstance(value, dict) != (key in ("dollars_per_hour", "watts")):
                raise HfkitError(f"{path}: {key}: must be {'a number' if isinstance(value, dict) else 'by machine'}")
            for name in value if isinstance(value, dict) else ():
                if name != "here" and name not in TABLE:
                    raise HfkitError(f"{path}: {key}.{name}: no such machine, {did_you_mean(str(name), TABLE)}")
            if not all(isinstance(each, int | float) and each >= 0 for each in numbers):
                raise HfkitError(f"{path}: {key}: must be a number that is not negative, got {value!r}")
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else float(value)
        found["source"] = str(path)
    return Prices(**found)


def named(text: str, prices: Prices) -> Machine:
    """The machine of `--on`: a name of `TABLE`, and how many, such as h100x8.

    Raises:
        HfkitError: for a name that is not known, or a number that is none.
    """
    lowered = text.strip().lower()
    name, _, count = (lowered, "", "1") if lowered in TABLE else lowered.rpartition("x")
    if name not in TABLE:
        name = name or lowered
        raise HfkitError(f"--on {text}: no such machine, {did_you_mean(name, TABLE)} (known: {', '.join(TABLE)})")
    if not count.isdecimal() or int(count) < 1:
        raise HfkitError(f"--on {text}: how many? write {name} for one, or {name}x8 for eight")
    flops, memory, bandwidth, watts, dollars = TABLE[name]
    return Machine(
        name,
        int(count),
        flops * 1e12,
        memory * 1e9,
        bandwidth * 1e9,
        prices.watts.get(name, watts),
        prices.dollars_per_hour.get(name, dollars),
        is_cpu=name == "cpu",
    )


def published(name: str) -> tuple[float, float, float, float, float] | None:
    """What `TABLE` has of a device, by the name that torch gives it; None of one that it does not have, and of a part
    of one (MIG), of which the numbers are not true."""
    words = name.lower().replace("rtx ", "rtx").replace("-", " ").split()
    found = next((TABLE[known] for part, known in LIKE.items() if part in words or known in words), None)
    return None if "mig" in words else found


def here(prices: Prices, flops: float) -> Machine:
    """This machine: its GPUs, or its processor, which is all that is asked for where no FLOPs are counted."""
    if flops and (torch := _torch_with_gpu()) is not None:
        count, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
        like = published(properties.name)
        watts = prices.watts.get("here", (like[3] if like else 300) * count) / count
        bandwidth = like[2] * 1e9 if like else 5e11
        name, memory = properties.name, properties.total_memory
        return Machine(name, count, flops, memory, bandwidth, watts, prices.dollars_per_hour.get("here"), is_here=True)
    watts = prices.watts.get("here", WATTS_A_CORE * usable_cores())
    dollars = prices.dollars_per_hour.get("here")
    held = total_memory() or 8e9
    return Machine("this machine", 1, flops, held, 2e10, watts, dollars, is_here=True, is_cpu=True)


def _torch_with_gpu() -> Any:
    import torch

    return torch if torch.cuda.is_available() else None


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a training is spread over processes, as an Accelerate configuration says.

    Args:
        weights, gradients, moments: whether each process holds only its share of them.
        offloads: of these, what lies in the memory of the machine instead of the device's.
        precision: of `mixed_precision`; None leaves it to hfkit.
        wants_gpus: whether it is for GPUs.
    """

    processes: int = 1
    name: str = "one process"
    weights: bool = False
    gradients: bool = False
    moments: bool = False
    offloads: frozenset[str] = frozenset()
    precision: str | None = None
    wants_gpus: bool = False


FSDP2 = Spread(name="FSDP2", weights=True, gradients=True, moments=True, wants_gpus=True)


def spread_of(config: str | Path | None) -> Spread | None:
    """The `Spread` of an Accelerate configuration; None without one.

    Raises:
        HfkitError: if the file is none.
    """
    if config is None:
        return None
    told = _mapping(Path(config))
    if "distributed_type" not in told:
        raise HfkitError(f"--config {config}: has no distributed_type; name a file that `accelerate config` writes")
    kind, precision = str(told["distributed_type"]).upper(), str(told.get("mixed_precision", "no"))
    common: dict[str, Any] = {
        "processes": int(told.get("num_processes") or 1),
        "precision": precision if precision in ("bf16", "fp16") else None,
        "wants_gpus": not told.get("use_cpu") and kind != "MULTI_CPU",
    }
    if kind == "FSDP":
        fsdp = told.get("fsdp_config") or {}
        strategy = str(fsdp.get("fsdp_sharding_strategy", "FULL_SHARD"))
        is_second = int(fsdp.get("fsdp_version", 1)) == 2
        keeps_weights = fsdp.get("fsdp_reshard_after_forward") is False if is_second else strategy == "SHARD_GRAD_OP"
        is_whole = strategy == "NO_SHARD" and not is_second
        everything = frozenset({"weights", "gradients", "moments"}) if fsdp.get("fsdp_offload_params") else frozenset()
        return Spread(
            name="FSDP2" if is_second else "FSDP",
            weights=not is_whole and not keeps_weights,
            gradients=not is_whole,
            moments=not is_whole,
            offloads=everything,
            **common,
        )
    if kind == "DEEPSPEED":
        deepspeed = told.get("deepspeed_config") or {}
        stage = int(deepspeed.get("zero_stage", 2))
        where = {"moments": "offload_optimizer_device", "weights": "offload_param_device"}
        away = {part for part, key in where.items() if str(deepspeed.get(key, "none")) not in ("none", "None")}
        common |= {"weights": stage >= 3, "gradients": stage >= 2, "moments": stage >= 1}
        return Spread(name=f"ZeRO-{stage}", offloads=frozenset(away), **common)
    return Spread(name="data parallel" if common["processes"] > 1 else "one process", **common)


def _mapping(path: Path) -> Json:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HfkitError(f"{path}: cannot be read: {error.strerror}; name a file that is there") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HfkitError(f"{path}: is not YAML: {str(error).splitlines()[0]}; correct it") from None
    if not isinstance(found, dict):
        raise HfkitError(f"{path}: must be a mapping of keys to values")
    return found
