"""Functions of `hfkit.planning.rehearsal`, each call in a process of its own."""

import functools
from typing import Any

from hfkit.runtime import isolated

REHEARSAL = "hfkit.planning.rehearsal"


def warm_up() -> None:
    isolated.warm_up(REHEARSAL)


def call(name: str, *arguments: Any) -> Any:
    """What a function of the rehearsal returns; None where it fails: a plan without a measurement is still a plan."""
    try:
        return isolated.call(f"{REHEARSAL}:{name}", *arguments, is_silent=True)
    except Exception:
        return None


@functools.lru_cache(maxsize=1)
def speeds() -> tuple[str, float, float, int]:
    """The fastest precision of this machine, its FLOP/s, the seconds that the libraries take to load and the bytes
    that they hold; measured in about a second, and where that fails, guessed."""
    return call("speed") or ("fp32", 5e10, 5.0, 6 * 10**8)
