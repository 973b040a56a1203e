"""The embedded corpus: the source text of the Python standard library that runs hfkit.

Megabytes of real code and English that every machine has, under the licence of Python itself.
"""

import ast
import platform
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from hfkit.errors import HfkitError

# Tests, bundled wheels and tables: neither prose nor code that a person would write.
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "encodings"}
_EXCLUDED_PREFIXES = ("_sysconfigdata", "__phello__")

_FEWEST_LINES, _FEWEST_WORDS, _MODULES_OF_A_PACKAGE = 3, 3, 6


def version() -> str:
    """Return what decides the content: the version of Python."""
    return f"Python {platform.python_version()}"


def documents() -> Iterator[tuple[str, bytes]]:
    """Yield each module of the standard library: its name (`json/decoder.py`) and its bytes, in the order of the
    names.

    Raises:
        HfkitError: if this Python has its library in no folder.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    has_modules = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _EXCLUDED_FOLDERS.intersection(parts) and not parts[-1].startswith(_EXCLUDED_PREFIXES):
            has_modules = True
            yield "/".join(parts), path.read_bytes()
    if not has_modules:
        raise HfkitError(f"python-stdlib: this Python has no library of .py files in {root}; use `files:` instead")


def functions(wanted: Callable[[str], bool] | None = None) -> Iterator[dict[str, str | int]]:
    """Yield functions with a docstring: `code` without it, and its first line as `summary`; `module`, `line`,
    `package`.

    Left out are those whose code or summary says next to nothing.

    Args:
        wanted: of a module's name, whether its functions are wanted. By default all are.
    """
    for function in _all_functions(wanted):
        summary = str(function.pop("docstring")).strip().partition("\n")[0].strip()
        if len(summary.split()) >= _FEWEST_WORDS:
            yield {**function, "summary": summary}


def packages(wanted: Callable[[str], bool] | None = None) -> Iterator[dict[str, str | int]]:
    """Yield functions of the larger packages: `code`, `package`, `module` and `line`. `wanted` is that of
    `functions`."""
    modules = Counter(name.partition("/")[0] for name, _ in documents() if "/" in name)
    for function in _all_functions(wanted):
        if modules[str(function["package"])] >= _MODULES_OF_A_PACKAGE:
            yield {key: value for key, value in function.items() if key != "docstring"}


def _all_functions(wanted: Callable[[str], bool] | None) -> Iterator[dict[str, str | int]]:
    for module, content in documents():
        if wanted is not None and not wanted(module):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in old modules
            try:
                text = content.decode("utf-8")
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
                code = lines[first - 1 : node.end_lineno]
                if docstring is not None:
                    start, end = node.body[0].lineno - first, (node.body[0].end_lineno or 0) - first
                    code = code[:start] + code[end + 1 :]
                if len(node.body) - (docstring is not None) >= 1 and len(code) >= _FEWEST_LINES:
                    yield {
                        "code": textwrap.dedent("".join(code)).rstrip() + "\n",
                        "docstring": docstring or "",
                        "module": module,
                        "line": node.lineno,
                        "package": module.partition("/")[0].removesuffix(".py"),
                    }
