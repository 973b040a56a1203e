"""The log of a server, written out."""

import json
import re
import time
from pathlib import Path
from typing import TextIO

from hfkit.errors import HfkitError
from hfkit.serving.store import read

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}


def export(folder: Path, since: str, output: TextIO) -> None:
    """Write a log as JSON, a record a line, the oldest first.

    Args:
        since: how far back, such as `90m`, `12h` or `7d`; all where it is empty.

    Raises:
        HfkitError: if there is no log, or `since` is no time.
    """
    match = re.fullmatch(r"(\d+)([smhd])", since)
    if since and match is None:
        raise HfkitError(f"--since {since}: must be a number and a unit, such as 90m, 12h or 7d")
    start = time.time() - int(match[1]) * UNITS[match[2]] if match else 0.0
    for record in read(folder, start):
        output.write(json.dumps(record, ensure_ascii=False) + "\n")
