"""Text to tokens and sentences in any script.

English gives what rouge_score and sacrebleu make of it. Those know ASCII alone: rouge_score finds no word in Russian,
and 13a takes a Chinese sentence for one word.
"""

import functools
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

import regex

from hfkit.errors import HfkitError, did_you_mean, reason

Tokenizer = Callable[[str], list[str]]

OWN_NAMES = ("auto", "ascii")  # the other names are sacrebleu's
# Scripts that put no spaces between words: each character stands for itself. The prolonged sound mark is of none.
_EAST_ASIAN = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_SPACELESS = _EAST_ASIAN + r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# Marks are parts of words, or Devanagari would fall apart at every vowel sign; so are the joiners of Persian.
_WORDS = regex.compile(
    rf"(?V1)[[{_SPACELESS}]&&[\p{{L}}\p{{N}}]]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--[{_SPACELESS}]][[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d]--[{_SPACELESS}]]*"
)
_ASCII_WORDS = re.compile(r"[A-Za-z0-9]+")
_ONE_SPACELESS = regex.compile(rf"[{_SPACELESS}]")
_ONE_EAST_ASIAN = regex.compile(rf"[{_EAST_ASIAN}]")
_ONE_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_TURKIC = re.compile("[ıİğĞ]")

# Full stops of scripts without spaces end a sentence wherever they stand, all others where white space follows.
# Closing quotes and brackets belong to the sentence before.
_CLOSERS = "[\"'”’»)\\]」』）】]*"
_SENTENCE_ENDS = re.compile(rf"[。！？｡]+{_CLOSERS}|[.!?…।॥؟۔።։။។]+{_CLOSERS}(?=\s)")
_ABBREVIATIONS = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "cf", "fig", "eq", "см"])


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters, marks and digits, and single characters where words have no
    spaces."""
    if text.isascii():
        return _ASCII_WORDS.findall(text)
    return _WORDS.findall(text)


def ngrams(tokens: list[str], order: int) -> Counter[Any]:
    """Return how often a text has each n-gram: a tuple, or the token itself for order 1."""
    return Counter(tokens if order == 1 else zip(*(tokens[start:] for start in range(order)), strict=False))


def fold(text: str, turkic: bool = False) -> str:
    """Return a text without regard to case.

    Unicode's case folding (also ß = ss and the two lower cases of Σ) of the composed form (NFC), so that equal letters
    are equal however they were typed. `İ` folds to `i`, not to an i with a dot above it. `I` folds to `i`, but in
    Turkic text to `ı`, its lower case there.

    Args:
        text: any.
        turkic: whether it is in a language with a dotless i, see `is_turkic`.
    """
    if turkic:
        text = unicodedata.normalize("NFC", text).replace("I", "ı")
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFC", text).casefold().replace("i\u0307", "i")
    return unicodedata.normalize("NFC", folded)


def is_turkic(texts: list[str]) -> bool:
    """Return whether texts are in Turkish or a relative with a dotless i: they have one of ı İ ğ Ğ, as no other
    language."""
    return any(_TURKIC.search(unicodedata.normalize("NFC", text)) for text in texts if not text.isascii())


def sentences(text: str) -> list[str]:
    """Return the sentences of a text. A text of several lines is taken as split already, a sentence a line."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) != 1:
        return lines
    pieces, start = [], 0
    for end in _SENTENCE_ENDS.finditer(text):
        if not _is_abbreviated(text[start : end.start()], end.group()):
            pieces.append(text[start : end.end()].strip())
            start = end.end()
    pieces.append(text[start:].strip())
    return [sentence for sentence in pieces if sentence]


def _is_abbreviated(before: str, end: str) -> bool:
    """Return whether a full stop is of a word such as `Dr.`, `J.` or `e.g.`, and ends no sentence."""
    if end != ".":
        return False
    word = (before.split() or [""])[-1].strip("\"'“‘«([")
    is_initial = len(word) == 1 and word.isupper() and word not in ("I", "Я")
    has_stops = re.fullmatch(r"(?:[^\W\d_]\.)+[^\W\d_]", word) is not None
    return is_initial or has_stops or word.casefold() in _ABBREVIATIONS


def names() -> list[str]:
    """Return what `tokenize` may be."""
    from sacrebleu.metrics.bleu import BLEU

    return [*OWN_NAMES, *BLEU.TOKENIZERS]


def bleu_name(references: list[str]) -> str:
    """Return sacrebleu's tokenizer for the script that most of a row's references is in, a word weighing as a
    character.

    `13a`, its default, where words have spaces; `zh` for Chinese; for Japanese `ja-mecab`, or `char` where MeCab is
    not installed; `char` for Thai, Lao, Khmer and Burmese.
    """
    text = " ".join(references)
    if text.isascii():
        return "13a"
    spaceless = len(_ONE_SPACELESS.findall(text))
    if 2 * spaceless < len(words(text)) or not spaceless:
        return "13a"
    if 2 * len(_ONE_EAST_ASIAN.findall(text)) < spaceless:
        return "char"
    if _ONE_KANA.search(text):
        return "ja-mecab" if _has_mecab() else "char"
    return "zh"


@functools.cache
def _has_mecab() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("MeCab", "ipadic"))


@functools.cache
def bleu_tokenizer(name: str) -> Callable[[str], str]:
    """Return sacrebleu's tokenizer of a name: a text to the same with spaces between its tokens.

    Raises:
        HfkitError: the name is not known, or what it needs is not installed or cannot be downloaded.
    """
    from sacrebleu.metrics.bleu import BLEU

    if name not in BLEU.TOKENIZERS:
        raise HfkitError(f'tokenize: "{name}" is not known, {did_you_mean(str(name), names())}')
    try:
        return BLEU(tokenize=name).tokenizer
    except Exception as error:  # whatever a missing package or file raises, the user's choice cannot be had
        raise HfkitError(
            f'tokenize: "{name}" cannot be used here: {reason(error)}; install what it needs or leave it at "auto"'
        ) from error


def of_rouge_score(use_stemmer: bool = False) -> Tokenizer:
    """Return rouge_score's tokenizer.

    Raises:
        HfkitError: if that package, an extra, is not installed.
    """
    try:
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        what = "use_stemmer: is" if use_stemmer else "tokenize: 'ascii' is"
        raise HfkitError(f"{what} rouge_score's, which is missing: pip install 'hfkit[rouge-score]'") from None
    return DefaultTokenizer(use_stemmer=use_stemmer).tokenize


def tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer by its name: `auto`, see `words`; `ascii`, rouge_score's; or one of sacrebleu's.

    Raises:
        HfkitError: as for `bleu_tokenizer`.
    """
    if name == "auto":
        return words
    if name == "ascii":
        return of_rouge_score()
    spaced = bleu_tokenizer(name)
    return lambda text: spaced(text.rstrip()).split()
