"""The patterns and checks of each kind of personal data: a text to the spans in it, in linear time.

A pattern begins with the character that is rare in text, a digit for most, and looks back from it: the search for one
is several times as fast as for what may begin anywhere.

Left as they are, on purpose:

- IP addresses that identify nobody: private, loopback, reserved and multicast ones, networks (`x.y.0.0`), four numbers
  of one digit (`1.2.3.4`), and what follows `version`, `section`, `Product/` and the like.
- Numbers that are grouped as on no card, and social security numbers without dashes unless `SSN` stands before them.
- E-mail addresses that are spelled out (`ann at example dot org`), and files named like one (`icon@2x.png`).
"""

import functools
import ipaddress
import re
from collections.abc import Callable, Iterator

from hfkit.errors import HfkitError, did_you_mean
from hfkit.privacy import secrets

Spans = Iterator[tuple[int, int]]

_LETTER = "A-Za-z0-9\u00c0-\u058f"  # of addresses: Latin, Greek, Cyrillic, Armenian
# E-mail: the domain is read on from the `@`, the local part back from it.
_DOMAIN = re.compile(
    rf"(?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.){{1,8}}"
    rf"(?P<top>xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z\u00c0-\u058f]{{2,24}})(?![{_LETTER}_])"
)
_LOCAL = re.compile(rf"[{_LETTER}_.%+'-]{{1,64}}")
_FILES = re.compile("avif|bmp|css|gif|heic|html|ico|jpe?g|m?js|json|jsx|mp4|pdf|png|scss|svg|tiff|tsx?|webp", re.I)


def _emails(text: str) -> Spans:
    at = text.find("@")
    while at >= 0:
        domain, local = _DOMAIN.match(text, at + 1), _LOCAL.match(text[max(0, at - 64) : at][::-1])
        if domain and local and not _FILES.fullmatch(domain["top"]):
            name = local[0][::-1].lstrip(".%+'-")
            if name and name != "git":  # git@host:path is no person's
                yield at - len(name), domain.end()
        at = text.find("@", at + 1)


# Cards: a number in one piece, or in the groups that cards show. Prefixes and lengths are those of ISO/IEC 7812.
_CARD = re.compile(
    r"[0-9](?<![A-Za-z0-9_][0-9])(?<![0-9]\.[0-9])(?:[0-9]{12,18}(?!\.[0-9])"
    r"|(?<![^/.][0-9]{4}[ -][0-9])(?<!^[0-9]{4}[ -][0-9])[0-9]{3}([ -])"  # not within a longer row of fours
    r"(?:[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?![ -][0-9]{4}(?![0-9]))(?P<last>\1[0-9]{1,3})?|[0-9]{6}\1[0-9]{4,5}"
    r"|[0-9]{3}\1[0-9]{3}\1[0-9]{3}))(?![A-Za-z0-9_])"
)
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"  # Mastercard
    r"|3[47]\d{13}|3(?:0[0-5]\d|095|[689]\d\d)\d{10,15}|35(?:2[89]|[3-8]\d)\d{12,15}"  # American Express, Diners, JCB
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12,15}|62\d{14,17}"  # Discover, UnionPay
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{9,15}"  # Maestro
    r"|220[0-4]\d{12,15}|(?:60|81|82)\d{14}|508\d{13}"  # Mir, RuPay
)
_DOUBLED = str.maketrans("0123456789", "0246813579")


def _cards(text: str) -> Spans:
    for match in _CARD.finditer(text):
        if _is_card(match[0]):
            yield match.span()
        elif match["last"] and _is_card(match[0][: -len(match["last"])]):  # a month or a security code behind a card
            yield match.start(), match.start("last")


def _is_card(number: str) -> bool:
    digits = number.replace(" ", "").replace("-", "")
    doubled = digits[-2::-2].translate(_DOUBLED)  # Luhn: every second digit from the right, less 9 where above it
    return bool(_ISSUER.fullmatch(digits)) and sum(map(int, digits[-1::-2] + doubled)) % 10 == 0


# IBAN: the lengths of the registry of ISO 13616, and a remainder of 1.
_IBAN = re.compile("[0-9](?<![A-Za-z0-9][A-Za-z]{2}[0-9])(?<=[A-Za-z]{2}[0-9])[0-9]")
_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FK FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}


def _ibans(text: str) -> Spans:
    for match in _IBAN.finditer(text):
        start = match.start() - 2
        if length := _LENGTHS.get(text[start : start + 2].upper()):
            body = _account(length - 4).match(text, match.end())
            if body and _remainder(body[0] + text[start : match.end()]) == 1:
                yield start, body.end()


@functools.cache
def _account(length: int) -> re.Pattern[str]:
    return re.compile(rf"(?:[ -]?[A-Za-z0-9]){{{length}}}(?![A-Za-z0-9])")


def _remainder(moved: str) -> int:
    return int("".join(str(int(character, 36)) for character in moved if character.isalnum())) % 97


# IP: IPv4, and IPv6 in the one range that is routed (2000::/3).
_IP = re.compile(
    r"[0-9](?<![A-Za-z0-9_.][0-9])(?:[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9_])(?!\.[0-9])"
    r"|(?<=[23])(?<!:.)[0-9A-Fa-f]{3}:[0-9A-Fa-f:.]{1,41}(?![A-Za-z0-9_:]))"
)
_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|rel|release|rev|revision|build|firmware|kernel|section|chapter|clause|article"
    r"|appendix|table|figure)s?|§)[\"'.:=( ]{0,4}$|(?<![\w/.])[A-Za-z]\w*[/-]$|\w[=~<>!]=$",
    re.IGNORECASE,
)


def _ips(text: str) -> Spans:
    for match in _IP.finditer(text):
        address = match[0].rstrip(".:")
        if _is_personal(address) and not _VERSION.search(text[max(0, match.start() - 24) : match.start()]):
            yield match.start(), match.start() + len(address)


def _is_personal(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    is_host = parsed.version == 6 or (len(address) > len("1.2.3.4") and not address.endswith(".0.0"))
    return is_host and parsed.is_global and not parsed.is_multicast


# Social security numbers of the US: never 000, 666 or 900-999 first, 00 then, 0000 last. With dashes, or after a name.
_SSN = re.compile(
    r"[0-8](?<![A-Za-z0-9_][0-8])(?<![0-9][-.][0-8])[0-9]{2}([ -]?)(?!00)[0-9]{2}\1(?!0000)[0-9]{4}"
    r"(?![A-Za-z0-9_])(?![-.][0-9])"
)
# Nothing that may itself be replaced stands between the name and the number.
_SSN_NAME = re.compile(r"(?:\bssns?|social.security|soc\.? ?sec)[^<>@0-9]{0,20}$", re.IGNORECASE)


def _ssns(text: str) -> Spans:
    for match in _SSN.finditer(text):
        if match[0][:3] in ("000", "666"):
            continue
        if match[1] == "-" or _SSN_NAME.search(text[max(0, match.start() - 40) : match.start()]):
            yield match.span()


def _secrets(text: str) -> Spans:
    yield from (match.span() for match in secrets.tokens(text))
    yield from secrets.assigned(text)


_PHONE = re.compile(r"[0-9](?<![0-9][0-9])(?:[ ().\-/]{0,3}[0-9]){6,}")
_MARGIN = 12  # characters around a number, by which `phonenumbers` tells it from a date or a part of a word
_LONGEST_PHONE = 40  # characters; a longer row of digits is a table


def phones(text: str, region: str) -> Spans:
    """Yield the phone numbers that are valid in their country, that of their `+` or else the region, and grouped so.

    Digits in a row without a `+` are as likely to be any other number, so they do not count.
    """
    import phonenumbers

    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise HfkitError(f"region: {region!r} is no country, {did_you_mean(region, phonenumbers.SUPPORTED_REGIONS)}")
    leniency = phonenumbers.Leniency.STRICT_GROUPING
    for digits in _PHONE.finditer(text):
        if digits.end() - digits.start() > _LONGEST_PHONE:
            continue
        offset = max(0, digits.start() - _MARGIN)
        window = text[offset : digits.end() + _MARGIN]
        for match in phonenumbers.PhoneNumberMatcher(window, region, leniency):
            start, end = offset + match.start, offset + match.end
            if text[start] == "(" and ")" not in text[start:end]:  # it closes behind the number
                start += 1
            is_grouped = not text[start:end].isdecimal()
            if is_grouped and start < digits.end() and digits.start() < end:
                yield start, end


FINDERS: dict[str, Callable[[str], Spans]] = {
    "email": _emails,
    "card": _cards,
    "iban": _ibans,
    "ip": _ips,
    "ssn": _ssns,
    "secret": _secrets,
}
