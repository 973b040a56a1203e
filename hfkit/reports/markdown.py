"""Pieces of Markdown that hold any text without breaking."""

import re
from collections.abc import Iterable


def cell(text: str) -> str:
    """Return a text on one line, with nothing that Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", " ".join(text.split()))


def number(value: float | int) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}"


def fenced(text: str, language: str = "") -> str:
    """Return a block of text as it is, between fences that are longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table of cells that are Markdown already; all but the first column are set to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, marks, *rows])
