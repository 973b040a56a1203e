"""The one exception that a user's mistake raises, and the words that its messages are made of."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class HfkitError(Exception):
    """A mistake of the user or a fault of the machine: shown without a traceback.

    The message names the key or file, its value, the rule and the remedy. `problems` holds one such message a line.
    """

    exit_code = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Rejected(HfkitError):
    """A result that misses what its recipe accepts. It is kept, but it is not finished."""

    exit_code = 3


def refuse(problems: Iterable[tuple[str, str]]) -> None:
    """Raise an error with every problem, if there is any.

    Args:
        problems: keys of a recipe, each with what is wrong about it.

    Raises:
        HfkitError: with all of them, if there are any.
    """
    if lines := [f"{key}: {problem}" for key, problem in problems]:
        raise HfkitError(*lines)


def reason(error: BaseException) -> str:
    """Return what a library's error says in one line, which may be its cause that says it."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def way_to(name: str) -> str:
    """Return how to get what is not at a place: a folder that lacks it, or an id on the Hub that did not answer."""
    if Path(name).exists() or name.startswith((".", "/", "~")):
        return "name a folder that has it"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return f"it is not in the cache, and HF_HUB_OFFLINE is set: unset it, or `hf download {name}` once before"
    return (
        f"there is no such folder, and the Hub did not give it: correct the id, `hf auth login` if it is private or "
        f"gated, and without a network `hf download {name}` once before"
    )


def shown(value: object) -> str:
    """Return a value as it was written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `did you mean "hidden_size"?` where a known name is near, else the list of the known names."""
    candidates = sorted(candidates)
    if not candidates:
        return "known: none"
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if near:
        return f'did you mean "{near[0]}"?'
    return f"known: {', '.join(candidates[:12])}{' ...' if len(candidates) > 12 else ''}"
