"""Being stopped: by SIGTERM or SIGINT, or because the launcher is gone.

Where there is nothing to lose a signal ends the process at once. In training it is noted, and the process ends when
the step is done and its checkpoint committed. A second signal changes nothing.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, goes on
PARENT_POLL_SECONDS = 1.0


class Stopped(BaseException):
    """The run was stopped from outside. Not an Exception: no library may take it for a failure of its own."""


_received: str | None = None
_is_patient = False


def requested() -> str | None:
    """Return the name of the signal that came, such as `SIGTERM`."""
    return _received


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number).name
        if not _is_patient:
            raise Stopped(_received)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Stopped`, and end with the launcher where one started this process."""
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread only
        return
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    if not {"ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ):  # accelerate launch, torchrun
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = None


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Record signals instead of raising; the caller polls `requested`.

    Raises:
        Stopped: at the end, if a signal came and nobody asked.
    """
    global _is_patient
    _is_patient = True
    try:
        yield
    finally:
        _is_patient = False
    if _received is not None:
        raise Stopped(_received)


def _follow(parent: int) -> None:
    """Follow the launcher: `accelerate launch` does not pass signals on to a single process; and a killed launcher
    cannot."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
