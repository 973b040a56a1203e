"""Personal data in text: find it, redact it, or replace it by stable pseudonyms.

Kinds: e-mail addresses, card and account numbers (IBAN), IP addresses, social security numbers of the US and secrets,
with the standard library alone; phone numbers with `phonenumbers` (`hfkit[pii]`).
Names and postal addresses of persons are not recognised: a redacted text is not an anonymous one.
"""

import contextlib
import hashlib
import hmac
import importlib.util
import ipaddress
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from hfkit.errors import HfkitError, did_you_mean
from hfkit.privacy.recognizers import FINDERS, phones

ALL = ("email", "card", "iban", "ip", "ssn", "secret")  # that need nothing installed
KINDS = (*ALL, "phone")
LEAST_KEY = 16  # bytes of the key of pseudonyms


@dataclass(frozen=True)
class Found:
    """A piece of personal data, `text[start:end]`."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Redacted:
    """A text without its personal data, and how many pieces of each kind were replaced."""

    text: str
    counts: dict[str, int]


def redact(text: str, kinds: Collection[str] = ALL, *, key: bytes | None = None, region: str = "US") -> Redacted:
    """Return the text with `<EMAIL>`, `<CARD>` ... in place of its personal data. A second time changes nothing.

    Args:
        kinds: of `KINDS`; "phone" is not in `ALL`, since it needs an optional package.
        key: with it, equal values get equal pseudonyms instead, such as `<EMAIL_kdnmgpabcfie>`.
        region: the country whose phone numbers need no `+` and country code, as in ISO 3166.

    Raises:
        HfkitError: a kind is not known or not installed, or the key is too short.
    """
    _check_key(key)
    counts: Counter[str] = Counter()
    while spans := find(text, kinds, region=region):  # again: what is replaced may have hidden what touches it
        pieces, end = [], 0
        for span in spans:
            value = text[span.start : span.end]
            name = f"<{span.kind.upper()}>" if key is None else pseudonym(span.kind, value, key)
            pieces += [text[end : span.start], name]
            end = span.end
            counts[span.kind] += 1
        text = "".join([*pieces, text[end:]])
    return Redacted(text, dict(counts))


def pseudonym(kind: str, value: str, key: bytes) -> str:
    """Return a stable name for a value, such as `<EMAIL_kdnmgpabcfie>`: 48 bits of its HMAC-SHA256 in letters a to p.

    Different spellings of one value (case, spaces, dashes) have one name. Whoever has the key can try all values, so
    keep it as secret as the data, or delete it.

    Raises:
        HfkitError: the kind is not known, or the key is too short.
    """
    _check_names([kind])
    _check_key(key)
    message = f"{kind}\0{_canonical(kind, value)}".encode("utf-8", "surrogatepass")
    digest = hmac.new(key, message, hashlib.sha256).hexdigest()[:12]
    # Letters alone: digits could be taken for a number on the next reading.
    return f"<{kind.upper()}_{digest.translate(_LETTERS)}>"


def find(text: str, kinds: Collection[str] = ALL, *, region: str = "US") -> list[Found]:
    """Return the personal data of a text in order. Of pieces that overlap the longest counts, then the first.

    Digits and signs of other scripts count as the ASCII ones; invisible characters within a piece belong to it.

    Raises:
        HfkitError: a kind is not known, or not installed.
    """
    _check_names(kinds)
    if "phone" in kinds and importlib.util.find_spec("phonenumbers") is None:
        raise HfkitError("kinds: phone needs phonenumbers: pip install 'hfkit[pii]'")
    ordered = [kind for kind in KINDS if kind in kinds]
    found = []
    for plain, hidden in _plain(text):
        for kind in ordered:
            for start, end in phones(plain, region) if kind == "phone" else FINDERS[kind](plain):
                if hidden:
                    start += bisect_right(hidden, start)
                    end += bisect_right(hidden, end - 1)
                found.append(Found(kind, start, end))
    return _without_overlaps(found)


def _check_key(key: bytes | None) -> None:
    if key is not None and len(key) < LEAST_KEY:
        raise HfkitError(f"key: has {len(key)} bytes, fewer than {LEAST_KEY}; use secrets.token_bytes(32)")


def _check_names(kinds: Collection[str]) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise HfkitError(f"kinds: {kind!r} is no kind of personal data, {did_you_mean(kind, KINDS)}")


def _without_overlaps(found: list[Found]) -> list[Found]:
    chosen: list[Found] = []
    # Sorting is stable, so that of equals the kind that comes first in KINDS stays first.
    for span in sorted(found, key=lambda span: (span.start - span.end, span.start)):
        at = bisect_left(chosen, span.start, key=lambda other: other.start)
        is_free = at == len(chosen) or span.end <= chosen[at].start
        if is_free and (at == 0 or chosen[at - 1].end <= span.start):
            chosen.insert(at, span)
    return chosen


_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
# Other digits, spaces, dashes, and the full-width forms of ASCII: one character each.
_FOREIGN = re.compile("[^\\D0-9]|[\u00a0\u2002-\u200a\u202f\u2010-\u2015\u2212\uff01-\uff0f\uff1a-\uff5e]")


def _plain(text: str) -> Iterator[tuple[str, list[int]]]:
    """Yield the text as the patterns read it, with, for each invisible character, how far the text before it goes."""
    if text.isascii():
        yield text, []
        return
    text = _FOREIGN.sub(_to_ascii, text)
    invisible = [match.start() for match in _INVISIBLE.finditer(text)]
    if invisible:
        yield _INVISIBLE.sub("", text), [at - number for number, at in enumerate(invisible)]
    yield _INVISIBLE.sub(" ", text), []  # they may stand between words as well


def _to_ascii(match: re.Match[str]) -> str:
    character = match[0]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)
    return "-" if unicodedata.category(character) in ("Pd", "Sm") else " "


def _canonical(kind: str, value: str) -> str:
    plain = _INVISIBLE.sub("", _FOREIGN.sub(_to_ascii, value))
    if kind == "ip":
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(plain))
    if kind in ("card", "iban", "ssn", "phone"):
        return "".join(filter(str.isalnum, plain)).upper()
    return plain if kind == "secret" else plain.casefold()
