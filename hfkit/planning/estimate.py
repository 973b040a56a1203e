"""What a plan says of a stage, and what it rests on. It imports nothing heavy: a data set is planned without torch."""

import dataclasses
from typing import NamedTuple

from hfkit.planning.machines import WITHOUT_BF16, Machine, Prices, Spread
from hfkit.planning.work import Chore, Work

A_LAUNCH = 12.0  # seconds until a named machine has loaded the libraries
OF_LIBRARIES = 0.7e9  # Python, torch and transformers on a CPU; on a GPU its context and kernels
FRAGMENTS = 1.05  # of a GPU's memory: what its allocator cannot use


class Speeds(NamedTuple):
    """What was measured of this machine.

    Args:
        precision: the fastest.
        flops: FLOP/s in it.
        imports: seconds that the libraries take to load.
        libraries: bytes that they hold.
    """

    precision: str
    flops: float
    imports: float
    libraries: float


@dataclasses.dataclass
class Estimate:
    """
    Args:
        seconds: of the stage, without the start of the process.
        spent: by what.
        memory: of each device at most, by part.
        disk: bytes, checkpoints and caches included.
        parameters, trained, tokens, steps: of its training; 0 where it has none.
        devices: how many it uses.
        is_measured: whether its models were rehearsed on this machine.
        change: the one change that makes it fit; "" where it fits, None where none does.
    """

    seconds: float = 0.0
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    disk: float = 0.0
    flops: float = 0.0
    parameters: int = 0
    trained: int = 0
    tokens: float = 0.0
    steps: int = 0
    devices: int = 1
    is_measured: bool = False
    change: str | None = ""

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    def energy(self, machine: Machine) -> float:
        """kWh, at the rated power of the devices."""
        return self.seconds * machine.watts * self.devices / 3.6e6

    def dollars(self, machine: Machine, prices: Prices) -> float:
        if machine.dollars_per_hour is None:
            return self.energy(machine) * prices.dollars_per_kwh
        return self.seconds / 3600 * machine.dollars_per_hour * machine.count

    def add(self, what: str, seconds: float) -> None:
        self.seconds += seconds
        self.spent[what] = self.spent.get(what, 0) + seconds


@dataclasses.dataclass
class Costs:
    """What turns work into estimates.

    Args:
        speeds: of this machine; for a named one, its own.
        loaded: bytes that a run holds when its first stage begins.
        reached: the share of the peak that is reached where nothing is measured.
    """

    machine: Machine
    spread: Spread
    prices: Prices
    speeds: Speeds
    loaded: float
    reached: float

    def of_one(self) -> "Costs":
        """For a stage that one process runs."""
        return dataclasses.replace(self, spread=dataclasses.replace(Spread(), precision=self.spread.precision))

    @property
    def start_seconds(self) -> float:
        """Until the first stage begins."""
        return 1.0 + self.speeds.imports if self.machine.is_here else A_LAUNCH

    def assumptions(self, is_measured: bool) -> str:
        """What the numbers rest on.

        Args:
            is_measured: whether all trainings were rehearsed.
        """
        machine, prices = self.machine, self.prices
        count = f"{machine.count} x " if machine.count > 1 else ""
        processes = f"{self.spread.processes} processes, {self.spread.name}"
        where = f"On {count}{machine.name}, {processes if self.spread.processes > 1 else 'one process'}"
        speed = f"{machine.flops / 1e12:,.3g} TFLOP/s in {self.precision}"
        if machine.is_here and not machine.flops:
            how = "nothing had to be measured"
        elif machine.is_here and is_measured:
            how = f"{speed}, measured; trainings of these sizes were timed"
        elif machine.is_here:
            how = f"the share of the measured {speed} that the last run reached, else {prices.utilisation:.0%}"
        else:
            how = f"{prices.utilisation:.0%} of the published {speed} assumed as utilisation"
        dollars = "" if machine.dollars_per_hour is None else f", ${machine.dollars_per_hour:,.2f} an hour"
        return (
            f"{where}: {how}.\n"
            f"Assumed, {prices.source} prices: {machine.watts:,.0f} W{dollars}{' each' if machine.count > 1 else ''}, "
            f"${prices.dollars_per_kwh:.2f} and {prices.grams_per_kwh:,.0f} g CO2 a kWh. A prices.yaml changes them."
        )

    @property
    def precision(self) -> str:
        if self.machine.is_here or self.machine.is_cpu:
            return self.speeds.precision
        return "fp16" if self.machine.name in WITHOUT_BF16 else "bf16"

    def of_chores(self, work: Work) -> Estimate:
        """The estimate of work that no model has a part in."""
        found = Estimate(disk=work.disk + work.cache, memory={"libraries": self.loaded, "data": work.left_behind})
        for part in work.parts:
            if isinstance(part, Chore):
                found.add(part.what, part.seconds)
        return found

    def needed(self, estimate: Estimate) -> float:
        """Bytes of a device's memory, all processes that share it together."""
        return estimate.peak * (self.spread.processes if self.machine.is_cpu else FRAGMENTS)
