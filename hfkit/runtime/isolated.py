"""A call in a process that begins and ends with it, so that its memory and its settings are its own."""

import importlib
import multiprocessing
import os
import traceback
from pathlib import Path
from typing import Any

from hfkit.errors import HfkitError

ENDING = 5  # seconds that a process has to end by itself once it has answered
GPUS = ("nvidia[0-9]*", "kfd", "dxg")  # devices of NVIDIA's driver, of AMD's, of Windows' in its Linux


class Ended(HfkitError):
    """The system ended the process before it answered."""


def call(function: str, *arguments: Any, is_silent: bool = False) -> Any:
    """Call a function in a process of its own and return its result.

    Args:
        function: `module:name`. The module is imported once for all calls, where the system can fork and has no GPU.
        arguments: what can be pickled, as the result must be.
        is_silent: whether what the process writes is thrown away.

    Raises:
        Ended: most likely for want of memory.
        Exception: what the function raises.
    """
    context = _context(function.partition(":")[0])
    answers, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments, is_silent), daemon=True)
    process.start()
    sender.close()
    try:
        answer = answers.recv()
        process.join(ENDING)
    except EOFError:
        raise Ended(f"{function}: its process was killed, probably out of memory") from None
    finally:
        process.kill()  # also where this run is stopped
        process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def warm_up(module: str) -> None:
    """Let the process that others fork from begin to load a module, beside whatever comes next."""
    if _context(module).get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def _context(module: str) -> Any:
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        # Libraries such as bitsandbytes begin to use the GPU while they are imported, and then forks cannot.
        context.set_forkserver_preload([] if _has_gpu() else [module])
    return context


def _has_gpu() -> bool:
    """Return whether the machine may have one, without torch, which takes seconds to import."""
    return any(any(Path("/dev").glob(pattern)) for pattern in GPUS)


def _answer(sender: Any, function: str, arguments: tuple[Any, ...], is_silent: bool) -> None:
    if is_silent:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    module, _, name = function.partition(":")
    try:
        answer = getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        if not isinstance(error, HfkitError):
            traceback.print_exc()  # it is lost on the way
        answer = error
    sender.send(answer)
