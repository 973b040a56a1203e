"""Functions of `hfkit.planning.rehearsal`, each call in a process that begins and ends with it."""

import functools
import importlib
import multiprocessing
import os
from typing import Any

REHEARSAL = "hfkit.planning.rehearsal"


def warm_up() -> None:
    """Let a process that has the libraries begin to load them, beside whatever comes next."""
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def call(name: str, *arguments: Any) -> Any:
    """What a function of the rehearsal returns; None where it fails, or the system ends its process."""
    context = _context()
    answers, given = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(given, name, *arguments), daemon=True)
    process.start()
    given.close()
    try:
        return answers.recv()
    except EOFError:
        return None
    finally:
        process.join(timeout=5)
        process.kill()
        process.join()


@functools.lru_cache(maxsize=1)
def speeds() -> tuple[str, float, float, int]:
    """The fastest precision of this machine, its FLOP/s, the seconds that the libraries take to load and the bytes
    that they hold; measured in about a second, and where that fails, guessed."""
    return call("speed") or ("fp32", 5e10, 5.0, 6 * 10**8)


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([REHEARSAL])
    return context


def _answer(given: Any, name: str, *arguments: Any) -> None:
    is_shown = "HFKIT_PLAN_DEBUG" in os.environ
    if not is_shown:
        silence = os.open(os.devnull, os.O_WRONLY)  # bars and warnings of what is no run
        os.dup2(silence, 1)
        os.dup2(silence, 2)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        answer = getattr(importlib.import_module(REHEARSAL), name)(*arguments)
    except Exception:  # a plan without a measurement is still a plan
        answer = None
        if is_shown:
            raise
    given.send(answer)
