"""Personal data and secrets in a text: found by patterns, and by the check digits where a kind has some."""

import hashlib
import hmac
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Match(NamedTuple):
    """A piece of personal data, at these characters of a text."""

    kind: str
    start: int
    end: int


class Redacted(NamedTuple):
    """A text without personal data, and how many pieces of each kind there were."""

    text: str
    counts: dict[str, int]


# Digits of an IBAN by country (ISO 13616), the letters of the country included.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24,
    "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "XK": 20,
}  # fmt: skip


def _card(text: str) -> str:
    """A number whose last digit checks the others (Luhn), and whose first one is that of an issuer of cards."""
    digits = [int(character) for character in text if character.isdigit()]
    if not 13 <= len(digits) <= 19 or digits[0] not in (2, 3, 4, 5, 6) or len(set(digits)) == 1:
        return ""
    doubled = [
        digit if index % 2 == 0 else digit * 2 - 9 * (digit > 4) for index, digit in enumerate(reversed(digits))
    ]
    return text if sum(doubled) % 10 == 0 else ""


def _iban(text: str) -> str:
    """An account number of its country's length whose remainder by 97 is 1 (ISO 7064); what follows it is left."""
    places = [place for place, character in enumerate(text) if character not in " -"]
    length = IBAN_LENGTHS.get(text[:2], 0)
    if not 0 < length <= len(places):
        return ""
    compact = "".join(text[place] for place in places[:length]).upper()
    number = int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4]))
    return text[: places[length - 1] + 1] if number % 97 == 1 else ""


def _address(text: str) -> str:
    """An address of the internet that is not everybody's own. Of what has colons, code is told by its few digits."""
    if ":" in text and (len(text) < 7 or not any(character.isdigit() for character in text)):
        return ""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    return "" if address.is_loopback or address.is_unspecified else text


def _ssn(text: str) -> str:
    """A number of the United States, without those that are never given out."""
    area, group, serial = text.split("-")
    return text if area not in ("000", "666") and area < "900" and group != "00" and serial != "0000" else ""


def _whole(text: str) -> str:
    return text


def _password(text: str) -> str:
    """An assignment of what looks random, not of a word or a placeholder."""
    text = text.rstrip(".,;:?!)]}>\"'")
    value = re.split(r"[:=]\s*", text, maxsplit=1)[-1].strip("'\"")
    is_random = len(value) >= 8 and len(set(value)) >= 6 and any(c.isdigit() for c in value)
    return text if is_random and any(c.isalpha() for c in value) else ""


TAKEN = "\ue000"  # for private use: in no pattern
# Of each kind what a text must hold for it to be looked for, its pattern, and what of a
# match of the pattern is such a piece, by its check digits or else its form.
# Repetitions are bounded, so that the time is linear in the text.
KINDS: dict[str, tuple[str, re.Pattern[str], Callable[[str], str]]] = {
    "secret": (
        "",
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{30,100}|sk-[A-Za-z0-9_-]{20,200}|gh[pousr]_[A-Za-z0-9]{30,255}|AKIA[0-9A-Z]{16}"
            r"|github_pat_\w{22,255}|xox[abprs]-[A-Za-z0-9-]{10,200}|AIza[0-9A-Za-z_-]{35}|glpat-[\w-]{20,64}"
            r"|eyJ[\w-]{10,1000}\.eyJ[\w-]{10,2000}\.[\w-]{10,1000})\b"
            r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[A-Za-z0-9+/=\s]{0,8000}"
            r"(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
        ),
        _whole,
    ),
    "password": (
        "",
        re.compile(
            r"(?i)\b(?:password|passwd|pwd|secret|api_?key|access_?token|auth_?token)['\"]?\s{0,3}[:=]\s{0,3}"
            r"['\"]?[^\s'\"<>;,)]{8,128}"
        ),
        _password,
    ),
    "email": (
        "@",
        re.compile(
            r"(?<![\w.+%-])[A-Za-z0-9_][\w.+%'-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
            r"[A-Za-z]{2,24}(?![\w-])"
        ),
        _whole,
    ),
    "iban": ("", re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,34}", re.ASCII), _iban),
    "card": (
        "",
        re.compile(
            r"(?<![\d.-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5})(?![\d-]|\.\d)", re.ASCII
        ),
        _card,
    ),
    "ssn": ("-", re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])", re.ASCII), _ssn),
    "ip": (
        "",
        re.compile(
            r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w:]|\.\d)|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:]))",
            re.ASCII,
        ),
        _address,
    ),
}


def find(text: str, kinds: Iterable[str] = tuple(KINDS)) -> list[Match]:
    """Return the personal data of a text in its order. Of two that overlap the kind that `KINDS` names first counts.

    Args:
        kinds: names of `KINDS`.
    """
    matches: list[Match] = []
    wanted = set(kinds)
    for kind, (sign, pattern, check) in KINDS.items():
        place = 0 if kind in wanted and sign in text else len(text)
        first = len(matches)
        while (candidate := pattern.search(text, place)) is not None:
            start, piece = candidate.start(), check(candidate[0])
            if piece:
                matches.append(Match(kind, start, start + len(piece)))
            place = start + max(len(piece), 1)  # what failed may begin before what is one
        for _, start, end in matches[first:]:
            text = f"{text[:start]}{TAKEN * (end - start)}{text[end:]}"
    return sorted(matches, key=lambda match: match.start)


def redact(
    text: str, kinds: Iterable[str] = tuple(KINDS), replace: Callable[[str, str], str] | None = None
) -> Redacted:
    """Return a text with its personal data replaced.

    Args:
        kinds: names of `KINDS`.
        replace: from a kind and the piece to what stands in its place. By default `<EMAIL>`, `<CARD>` ...
    """
    parts, end = [], 0
    matches = find(text, kinds)
    for match in matches:
        piece = text[match.start : match.end]
        parts += [text[end : match.start], replace(match.kind, piece) if replace else f"<{match.kind.upper()}>"]
        end = match.end
    return Redacted("".join([*parts, text[end:]]), dict(Counter(match.kind for match in matches)))


def pseudonym(kind: str, value: str, key: bytes) -> str:
    """Return a name that stands for a value wherever it occurs, and tells nothing of it without the key."""
    return f"<{kind.upper()}:{hmac.new(key, f'{kind} {value}'.encode(), hashlib.sha256).hexdigest()[:12]}>"
