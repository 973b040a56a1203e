"""Personal data is found in generated rows, and what only looks like it is left alone."""

import random
import time

import pytest

from hfkit.privacy.personal_data import IBAN_LENGTHS, KINDS, find, pseudonym, redact

FRAMES = ["{}", "write to {} today", "({})", "\"{}\", he said", "id={};", "a\t{}\tb", "Contact: {}.", "<b>{}</b>",
          "{} and more", "wie {}?"]  # fmt: skip


def luhn(digits: str) -> str:
    for last in "0123456789":
        number = [int(digit) for digit in digits + last]
        doubled = [digit if index % 2 == 0 else sum(divmod(2 * digit, 10)) for index, digit in enumerate(number[::-1])]
        if sum(doubled) % 10 == 0:
            return digits + last
    raise AssertionError


def iban(chance: random.Random) -> str:
    country = chance.choice(sorted(IBAN_LENGTHS))
    account = "".join(chance.choices("0123456789", k=IBAN_LENGTHS[country] - 4))
    number = int("".join(str(int(character, 36)) for character in f"{account}{country}00"))
    text = f"{country}{98 - number % 97:02}{account}"
    return text if chance.random() < 0.5 else " ".join(text[i : i + 4] for i in range(0, len(text), 4))


def made(kind: str, chance: random.Random) -> str:
    letters, digits = "abcdefghijklmnopqrstuvwxyz", "0123456789"
    word = "".join(chance.choices(letters, k=chance.randint(2, 10)))
    if kind == "email":
        name = chance.choice([word, f"{word}.{word[::-1]}", f"{word}+tag", f"{word}_{chance.randint(1, 99)}"])
        return f"{name}@{word}.{chance.choice(['com', 'co.uk', 'de', 'org', 'museum'])}"
    if kind == "card":
        number = luhn(chance.choice("3456") + "".join(chance.choices(digits, k=14)))
        separator = chance.choice(["", " ", "-"])
        return separator.join(number[i : i + 4] for i in range(0, 16, 4))
    if kind == "iban":
        return iban(chance)
    if kind == "ip":
        if chance.random() < 0.3:
            return ":".join(f"{chance.randrange(1, 65536):x}" for _ in range(8))
        return ".".join(str(chance.randint(1, 254)) for _ in range(4)).replace("127.", "126.", 1)
    if kind == "ssn":
        return f"{chance.randint(1, 665):03}-{chance.randint(1, 99):02}-{chance.randint(1, 9999):04}"
    secret = "".join(chance.choices(letters + digits + letters.upper(), k=40))
    if kind == "password":
        return f"{chance.choice(['password=', 'API_KEY: ', 'access_token = '])}{secret[:16]}7a"
    return chance.choice(["hf_", "sk-", "ghp_", "glpat-"]) + secret.replace("-", "x")


def harmless(chance: random.Random) -> str:
    n = chance.randint
    return chance.choice(
        [
            f"version {n(1, 30)}.{n(0, 20)}.{n(0, 99)}",
            f"{n(1, 23):02}:{n(0, 59):02}:{n(0, 59):02}",
            f"978-3-{n(10, 99)}-{n(100000, 999999)}-{n(0, 9)}",
            "".join(chance.choices("0123456789abcdef", k=40)),
            f"order {n(10**8, 10**9)}",
            f"x[{n(0, 9)}:{n(10, 99)}] @property",
            f"{n(1990, 2030)}-{n(1, 12):02}-{n(1, 28):02}T{n(0, 23):02}:00:00",
            f"{n(10**15, 10**16 - 2) // 2 * 2 + 1}.5",
            "password: required",
            "std::vector<int> a::b",
            f"+49 30 {n(10**6, 10**7)}",
            f"user@localhost {n(1, 9)}",
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_recall_and_precision(kind: str) -> None:
    chance = random.Random(kind)
    hits = wrong = 0
    for index in range(2000):
        value, frame = made(kind, chance), FRAMES[index % len(FRAMES)]
        text = f"{harmless(chance)} {frame.format(value)} {harmless(chance)}"
        matches = find(text)
        right = [match for match in matches if match.kind == kind and text[match.start : match.end] == value]
        hits += bool(right)
        wrong += len(matches) - len(right)
    assert hits / 2000 >= 0.98, f"recall {hits / 2000}"
    assert hits / (hits + wrong) >= 0.97, f"precision {hits / (hits + wrong)}"


def test_a_redacted_text_holds_nothing_more() -> None:
    chance = random.Random(1)
    for _ in range(300):
        text = " ".join(made(kind, chance) for kind in KINDS)
        once = redact(text)
        assert redact(once.text).text == once.text and sum(once.counts.values()) >= len(KINDS)
    assert redact("mail ann@example.org, card 4111 1111 1111 1111").text == "mail <EMAIL>, card <CARD>"
    assert redact("ann@example.org", kinds=["card"]).text == "ann@example.org"


def test_pseudonyms_are_stable_and_keyed() -> None:
    def replace(kind: str, value: str) -> str:
        return pseudonym(kind, value, b"key")

    text = redact("a@b.com c@d.com a@b.com", replace=replace).text.split()
    assert text[0] == text[2] != text[1] and "a@b" not in "".join(text)
    assert pseudonym("email", "a@b.com", b"other") != text[0]


HOSTILE = ["a", "1", "1 ", "a.b@", "::1:", "A1", "DE12 ", "1-", "sk-", "-----BEGIN PRIVATE KEY-----", "password="]


@pytest.mark.parametrize("text", [*((piece * 100_000)[:100_000] for piece in HOSTILE), "\u0661" * 1000 + "\ud800"])
def test_hostile_texts_take_linear_time(text: str) -> None:
    start = time.process_time()
    find(text)
    assert time.process_time() - start < 1.5
