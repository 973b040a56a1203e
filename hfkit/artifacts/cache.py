"""What is kept beside results, by a digest of what it is made from: rows of tokens, a teacher's targets, plans."""

from collections.abc import Callable
from pathlib import Path

from hfkit.artifacts.manifest import locked, new_folder

NAME = ".cache"
_DIGITS = 16  # of a digest in a name


def beside(output: Path) -> Path:
    """Return the cache that the results beside `output` share."""
    return output.parent / NAME


def path_of(cache: Path, kind: str, digest: str, suffix: str = "") -> Path:
    """Return the place of an entry, such as `.cache/tokens-0123456789abcdef`."""
    return cache / f"{kind}-{digest[:_DIGITS]}{suffix}"


def cached(path: Path, last: str, make: Callable[[Path], None]) -> Path:
    """Return the folder at `path`, made unless it is there. Call it on the main process only.

    Args:
        last: the file of it that is written last.
        make: fills the folder that it is given, which appears whole or not at all.
    """
    if not (path / last).exists():
        with locked(path), new_folder(path) as work:
            make(work)
    return path
