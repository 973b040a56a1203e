"""The one exception that a user's mistake raises, and the words that its messages are made of."""

import difflib
from collections.abc import Iterable


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
    """
    Args:
        problems: keys of a recipe, each with what is wrong about it.

    Raises:
        HfkitError: with all of them, if there are any.
    """
    if found := [f"{key}: {problem}" for key, problem in problems]:
        raise HfkitError(*found)


def reason(error: BaseException) -> str:
    """What a library's error says in one line, which may be its cause that says it."""
    told = error.__cause__ or error
    return (str(told).strip() or type(told).__name__).splitlines()[0]


def shown(value: object) -> str:
    """A value as it was written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean "hidden_size"?` where a known name is near, else the list of the known names."""
    known = sorted(known)
    if not known:
        return "known: none"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f'did you mean "{near[0]}"?'
    return f"known: {', '.join(known[:12])}{' ...' if len(known) > 12 else ''}"
