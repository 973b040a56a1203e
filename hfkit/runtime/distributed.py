"""Several processes, one of which does what only one may do."""

import contextlib
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from hfkit.errors import HfkitError, Rejected
from hfkit.runtime import signals

if TYPE_CHECKING:
    from torch.distributed import Store

Result = TypeVar("Result")
PATIENCE = datetime.timedelta(days=30)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def say(text: str = "") -> None:
    """Print on the main process."""
    if is_main():
        print(text, flush=True)


def is_terminal() -> bool:
    """Return whether somebody watches, so that bars may be drawn: they go to the standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def on_main(name: str, function: Callable[[], Result]) -> Result:
    """Call `function` on the main process and return its result, which must be JSON, on every process.

    The others wait at the launcher's key-value store, not in a collective: nothing times out while the main process
    tokenizes for hours. Every process must come here with the same names in the same order.

    Raises:
        HfkitError: on every process, if the main process raised one.
        SystemExit: on the others, if the main process failed in another way, which it reports itself.
    """
    if world_size() == 1:
        return function()
    key = f"hfkit/{_next_number()}/{name}"
    if not is_main():
        answer = json.loads(_wait_for([key])[0])
        if "problems" in answer:
            raise (Rejected if answer["is_rejected"] else HfkitError)(*answer["problems"])
        if "failed" in answer:
            raise SystemExit(1)
        return answer["result"]
    outcome: dict[str, Any] = {"failed": True}
    try:
        result = function()
        outcome = {"result": result}
        return result
    except HfkitError as error:
        outcome = {"problems": error.problems, "is_rejected": isinstance(error, Rejected)}
        raise
    finally:
        _set(key, outcome)


def of_all(name: str, value: Result) -> list[Result]:
    """Return what every process brings, JSON, in the order of their ranks. It waits for all of them."""
    if world_size() == 1:
        return [value]
    number = _next_number()
    keys = [f"hfkit/{number}/{name}/{other}" for other in range(world_size())]
    _set(keys[rank()], value)
    return [json.loads(value) for value in _wait_for(keys)]


def _set(key: str, value: object) -> None:
    with _launcher_there():
        _store().set(key, json.dumps(value))


def _wait_for(keys: list[str]) -> list[bytes]:
    with _launcher_there():
        _store().wait(keys, PATIENCE)
        return [_store().get(key) for key in keys]


@contextlib.contextmanager
def _launcher_there() -> Iterator[None]:
    """Handle the loss of the launcher, which keeps the store: if it was killed, this run ends like one that was asked
    to."""
    from torch.distributed import DistError

    try:
        yield
    except DistError:
        raise signals.Stopped("the end of its launcher") from None


@functools.cache
def _store() -> "Store":
    from torch.distributed import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    return store


_calls = iter(range(1 << 62))


def _next_number() -> int:
    """Tell apart two calls of one name: processes make the same calls in the same order."""
    return next(_calls)
