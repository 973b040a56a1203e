"""Metrics of text that need no overlap: exact match, length and variety."""

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import regex
from datasets import Features, Value

from hfkit.errors import HfkitError, reason
from hfkit.metrics import scripts
from hfkit.metrics.base import RowMetric, Statistics

PREDICTIONS = Features({"predictions": Value("string")})
PUNCTUATION = regex.compile(rf"[\p{{P}}\p{{S}}{re.escape(string.punctuation)}]")
DIGITS = re.compile(r"\d")


class ExactMatch(RowMetric):
    """The share of predictions that are one of their references, 0 to 1, as `evaluate`'s exact_match."""

    about = "Exact match: the share of predictions that are one of their references, 0 to 1."
    takes_blank_references = True  # a question may have no answer

    def _statistics(
        self,
        predictions: list[str],
        references: list[Any],
        *,
        regexes_to_ignore: Sequence[str] | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_numbers: bool = False,
    ) -> Statistics:
        """Return one for each row and one for each match.

        Args:
            regexes_to_ignore: what is removed, before all else.
            ignore_case: whether case is left out of account, see `scripts.fold`.
            ignore_punctuation: whether punctuation and symbols of any script are removed.
            ignore_numbers: whether digits of any script are removed.
        """
        try:
            ignored = [re.compile(pattern) for pattern in regexes_to_ignore or []]
        except re.error as error:
            raise HfkitError(f"regexes_to_ignore: {error.pattern!r} is not valid: {reason(error)}") from None
        removed = [PUNCTUATION] * ignore_punctuation + [DIGITS] * ignore_numbers

        def cleaned(text: str, turkic: bool) -> str:
            for pattern in ignored:
                text = pattern.sub("", text)
            if ignore_case:
                text = scripts.fold(text, turkic)
            for pattern in removed:
                text = pattern.sub("", text)
            return text

        values = []
        for prediction, several in zip(predictions, references, strict=True):
            turkic = ignore_case and scripts.is_turkic(several)
            is_match = cleaned(prediction, turkic) in {cleaned(reference, turkic) for reference in several}
            values.append((1, is_match))
        options = {
            "regexes_to_ignore": regexes_to_ignore,
            "ignore_case": ignore_case,
            "ignore_punctuation": ignore_punctuation,
            "ignore_numbers": ignore_numbers,
        }
        return Statistics(
            np.array(values, dtype=np.float64),
            lambda sums: {"exact_match": float(sums[1] / sums[0])},
            self._signature(options, references, None),
        )


class Length(RowMetric):
    """The mean length of predictions, in words and in characters."""

    row_features = PREDICTIONS
    about = "Length: the mean number of words and characters of predictions."

    def _statistics(self, predictions: list[str], references: list[Any], *, tokenize: str = "auto") -> Statistics:
        """Return one, the words and the characters of each row; `tokenize`, see `scripts.tokenizer`."""
        cut = scripts.tokenizer(tokenize or "auto")
        return Statistics(
            np.array([(1, len(cut(text)), len(text)) for text in predictions], dtype=np.float64),
            lambda sums: {
                "length_words": float(sums[1] / sums[0]),
                "length_characters": float(sums[2] / sums[0]),
            },
            self._signature({"tokenize": tokenize or "auto"}, None, None),
        )


class Distinct(RowMetric):
    """distinct-n: how many different n-grams all predictions have for each that they have, 0 to 1 (Li et al. 2016).

    The paper divides by the number of words for any n; here it is that of n-grams, so that 1 is the most.
    """

    row_features = PREDICTIONS
    about = "distinct-1 and distinct-2: the share of different n-grams in all predictions (Li et al. 2016), 0 to 1."

    def _statistics(self, predictions: list[str], references: list[Any], *, tokenize: str = "auto") -> Statistics:
        """Return, of each order, the row's part in the different n-grams, and the row's n-grams.

        How many n-grams are different is no sum over rows, and drawing rows twice would make it less. So each n-gram's
        one is parted among the rows by how often they have it. The parts sum to the number exactly; intervals hold
        them as they are in all rows, which is an approximation. A row by itself scores what it adds to the variety.
        """
        cut = scripts.tokenizer(tokenize or "auto")
        columns = []
        for order in (1, 2):
            rows = []
            for text in predictions:
                rows.append(scripts.ngrams(cut(scripts.fold(text)), order))
            everywhere: Counter[Hashable] = Counter()
            for row in rows:
                everywhere.update(row)
            columns.append([sum(count / everywhere[ngram] for ngram, count in row.items()) for row in rows])
            columns.append([row.total() for row in rows])

        def combine(sums: np.ndarray) -> dict[str, float]:
            return {f"distinct_{n}": float(sums[2 * n - 2] / (sums[2 * n - 1] or 1)) for n in (1, 2)}

        signature = self._signature({"tokenize": tokenize or "auto"}, None, None)
        return Statistics(np.array(columns, dtype=np.float64).T, combine, signature)
