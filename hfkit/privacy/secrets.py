"""What must not leave the machine, or stand in a file: tokens, the home folder, the name of the user."""

import getpass
import os
import re
from pathlib import Path

from hfkit.privacy.personal_data import KINDS

_NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_TOKENS = KINDS["secret"][1]
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.~-])/[^\s\"'`<>|()]*")
LEAST_CHARACTERS = 12  # of a secret; shorter values of such variables are switches and names


def in_environment() -> set[str]:
    """The values of the environment variables whose names say that they are secret, such as HF_TOKEN."""
    return {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= LEAST_CHARACTERS}


def holds_secret(text: str) -> bool:
    """Whether a text holds one of the secrets of the environment, or anything in the form of a known kind of token."""
    return _TOKENS.search(text) is not None or any(secret in text for secret in in_environment())


def without_secrets(text: str) -> str:
    """The text with all of these replaced by `***`, for a message."""
    for secret in in_environment():
        text = text.replace(secret, "***")
    return _TOKENS.sub("***", text)


def without_places(text: str) -> str:
    """The text with paths told from the working directory or from `~`, and without the name of the user in them."""
    return _ABSOLUTE_PATH.sub(lambda match: _told(match[0]), text)


def tells_place(content: bytes) -> bool:
    """Whether bytes hold the path of the home folder."""
    home = Path.home()
    return home != Path(home.anchor) and re.search(re.escape(str(home).encode()) + rb"[/\\]", content) is not None


def _told(path: str) -> str:
    for folder, name in ((Path.cwd(), "."), (Path.home(), "~")):
        if folder == Path(folder.anchor):
            continue
        if path == str(folder):
            return name
        if path.startswith(f"{folder}{os.sep}"):
            rest = path[len(str(folder)) + 1 :]
            return rest if name == "." else f"~/{rest}"
    return "/".join("user" if part == _user() else part for part in path.split("/"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # of a container without a table of users
        return ""
