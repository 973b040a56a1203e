"""The embedded corpus: the source text of the Python standard library that runs hfkit.

Megabytes of real code and English that every machine has, under the licence of Python itself.
"""

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hfkit.errors import HfkitError

# Tests, bundled wheels and tables: neither prose nor code that a person would write.
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "encodings"}
_EXCLUDED_PREFIXES = ("_sysconfigdata", "__phello__")


def version() -> str:
    """What decides the content: the version of Python."""
    return f"Python {platform.python_version()}"


def documents() -> Iterator[tuple[str, bytes]]:
    """Each module of the standard library: its name (`json/decoder.py`) and its bytes, in the order of the names.

    Raises:
        HfkitError: if this Python has its library in no folder.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _EXCLUDED_FOLDERS.intersection(parts) and not parts[-1].startswith(_EXCLUDED_PREFIXES):
            found = True
            yield "/".join(parts), path.read_bytes()
    if not found:
        raise HfkitError(f"python-stdlib: this Python has no library of .py files in {root}; use `files:` instead")
