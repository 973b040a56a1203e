"""Whether what serving needs beside hfkit is installed."""

import importlib.util

from hfkit.errors import HfkitError

MODULES = ("fastapi", "uvicorn", "prometheus_client")


def check() -> None:
    """
    Raises:
        HfkitError: with the command that installs what is missing.
    """
    if missing := [name for name in MODULES if importlib.util.find_spec(name) is None]:
        raise HfkitError(f'serving needs {", ".join(missing)}: pip install "hfkit[serve]"')
