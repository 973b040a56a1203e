"""What must not leave the machine, or stand in a file: tokens, the home folder, the name of the user."""

import getpass
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
# What opens a known kind of token: a text without any of these holds none, and is not searched.
_MARKS = (
    *("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "AKIA", "ASIA"),
    *("AIza", "xox", "_live_", "eyJ", "-----BEGIN"),
)
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-(?=[a-z_-]{0,40}[A-Z0-9])[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}|A[KS]IA[0-9A-Z]{16}|AIza[A-Za-z0-9_-]{35}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|[rsp]k_live_[A-Za-z0-9]{16,})\b"
    # A JSON web token, whose first two parts are JSON objects in base64.
    r"|(?<![A-Za-z0-9_.-])eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    # A private key in PEM: up to its last line or, where that was cut off, as far as its lines of base64 go.
    r"|-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]+(?:-(?!----)[^-]*)*-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:(?:\s|\\[nr])+[A-Za-z0-9+/=]{16,})+)"
)
_NAME_ENDS = ("password", "passwd", "passphrase", "pwd", "secret", "key", "token")
_KEY_KINDS = re.compile(r"(?:api|access|auth|private|signing|secret)[_-]?$", re.IGNORECASE)  # other keys are names
_ASSIGNED = re.compile(
    r"[\\\"'\]]{0,3}[ \t]{0,4}(?::=|=>|==?|[:>])[ \t]{0,4}(?:[Bb]earer )?\\?"
    r"(?:([\"'`])(?P<quoted>[^\s\"'`\\]{8,})\\?\1|(?P<bare>[^\s\"'`\\,;<>&(){}\[\]$]{8,}))"
)
# Words, each with two digits at most: the name of a variable or what stands for a secret, such as `your-api-key-1`.
_WORDS = re.compile(r"_*[A-Za-z]+\d{0,2}(?:[._:/-]+(?:[A-Za-z]+\d{0,2}|\d{1,2}))*_*")
_MIXED = re.compile(r"[0-9]|[^\w.:/-]")
LEAST_ENTROPY = 2.5  # bits a character: eight characters of which two come twice
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.~-])/[^\s\"'`<>|()]*")
LEAST_CHARACTERS = 12  # of a secret; shorter values of such variables are switches and names


def in_environment() -> set[str]:
    """The values of the environment variables whose names say that they are secret, such as HF_TOKEN."""
    return {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= LEAST_CHARACTERS}


def tokens(text: str) -> Iterator[re.Match[str]]:
    """Yield the matches of known kinds of tokens: API keys, JSON web tokens, private keys in PEM."""
    if any(mark in text for mark in _MARKS):
        yield from _TOKENS.finditer(text)


def assigned(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each value that is given to a password, secret, key or token and looks random."""
    lowered = text.lower()
    if len(lowered) != len(text):  # one letter has a lower case of two characters
        lowered = text.replace("\u0130", "i").lower()
    for name in _NAME_ENDS:
        at = lowered.find(name)
        while at >= 0:
            behind = at + len(name)
            is_name = name != "key" or _KEY_KINDS.search(text[max(0, at - 8) : at])
            if is_name and (match := _ASSIGNED.match(text, behind)):
                start, behind = match.span("quoted" if match["quoted"] else "bare")
                is_code = match["bare"] and text[behind : behind + 1] in tuple("({[$")  # a call, or part of a template
                value = text[start:behind] if match["quoted"] else text[start:behind].rstrip(".:!?")
                if not is_code and _looks_random(value):
                    yield start, start + len(value)
            at = lowered.find(name, behind)


def _looks_random(value: str) -> bool:
    """Return whether a value is no word, name, variable of a template, address or number, and its characters vary."""
    if len(value) < 8 or value[0] in "$%{<" or "://" in value or _WORDS.fullmatch(value):
        return False
    if not _MIXED.search(value) or not any(map(str.isalpha, value)):
        return False
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values())
    return entropy >= LEAST_ENTROPY


def holds_secret(text: str) -> bool:
    """Whether a text holds one of the secrets of the environment, or anything in the form of a known kind of token."""
    return next(tokens(text), None) is not None or any(secret in text for secret in in_environment())


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
