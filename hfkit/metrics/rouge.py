"""ROUGE (Lin 2004), with the values of Google's rouge_score and none of its tables."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hfkit.artifacts.manifest import Metrics
from hfkit.errors import HfkitError, did_you_mean
from hfkit.metrics import scripts
from hfkit.metrics.base import RowMetric, Statistics

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(RowMetric):
    """The mean F-measure of overlaps, 0 to 1; of several references a row the best counts, for each type by itself.

    As `evaluate`'s rouge, except for what is wrong there: words are those of any script; rougeLsum splits texts of one
    line into sentences; and the score is the mean itself, not the median of random resamples of it.
    """

    about = "ROUGE: overlap of n-grams and longest common subsequences with references (Lin 2004)."

    def _statistics(
        self,
        predictions: list[str],
        references: list[Any],
        *,
        rouge_types: Sequence[str] | None = None,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
        tokenizer: scripts.Tokenizer | None = None,
        tokenize: str = "auto",
        split_summaries: bool = True,
    ) -> Statistics:
        """Return F-measures of rows.

        Args:
            rouge_types: of rouge1 to rouge9, rougeL and rougeLsum.
            use_aggregator: for `compute`: means, or else lists of the values of rows.
            use_stemmer: whether English words lose their endings (Porter 1980).
            tokenizer: what makes words of a text, which then is not lowercased.
            tokenize: the tokenizer's name, see `scripts.tokenizer`. With `ascii` it is rouge_score in all.
            split_summaries: whether texts of one line are split into sentences for rougeLsum.
        """
        types = list(rouge_types or TYPES)
        for name in types:
            if not re.fullmatch(r"rouge([1-9]|L|Lsum)", name):
                raise HfkitError(f'rouge_types: "{name}" is not known, {did_you_mean(name, TYPES)}')
        scorer = _Scorer(types, tokenizer, tokenize or "auto", use_stemmer, split_summaries)
        scores = np.array([scorer.row(*pair) for pair in zip(predictions, references, strict=True)], dtype=np.float64)

        def combine(sums: np.ndarray) -> dict[str, float]:
            return {name: float(total / sums[0]) for name, total in zip(types, sums[1:], strict=True)}

        def lists() -> Metrics:
            return {name: scores[:, column].tolist() for column, name in enumerate(types)}

        options = {"rouge_types": types, "use_stemmer": use_stemmer, "split_summaries": split_summaries}
        options |= {"tokenize": tokenize or "auto"} if tokenizer is None else {"tokenizer": tokenizer}
        return Statistics(
            np.hstack([np.ones((len(scores), 1)), scores]),
            combine,
            self._signature(options, references, None),
            None if use_aggregator else lists,
        )


class _Scorer:
    """The F-measures of one row at a time."""

    def __init__(
        self,
        types: list[str],
        tokenizer: scripts.Tokenizer | None,
        tokenize: str,
        use_stemmer: bool,
        split_summaries: bool,
    ):
        self.types, self.split_summaries = types, split_summaries
        self.orders = sorted({int(name[5:]) for name in types if name[5:].isdigit()})
        self.folds = tokenizer is None and tokenize != "ascii"  # which has its own lower case
        self.tokenizer = tokenizer or scripts.tokenizer(tokenize)
        self.stemmer: scripts.Tokenizer | None = None
        if use_stemmer and tokenizer is None:
            self.stemmer = scripts.of_rouge_score(use_stemmer=True)
        self.stems: dict[str, str] = {}

    def row(self, prediction: str, references: list[str]) -> list[float]:
        """Return, of each type, the best F-measure that a reference gives."""
        turkic = self.folds and scripts.is_turkic(references)
        predicted = _Text(self, prediction, turkic)
        pairs = [self._pair(_Text(self, reference, turkic), predicted) for reference in references]
        return pairs[0] if len(pairs) == 1 else [max(scores) for scores in zip(*pairs, strict=True)]

    def words(self, text: str, turkic: bool) -> list[str]:
        tokens = list(self.tokenizer(scripts.fold(text, turkic) if self.folds else text))
        return tokens if self.stemmer is None else [self._stem(token, self.stemmer) for token in tokens]

    def _stem(self, word: str, stemmer: scripts.Tokenizer) -> str:
        """Return rouge_score's stem of an English word, and any other word as it is."""
        if word not in self.stems:
            self.stems[word] = stemmer(word)[0] if word.isascii() and word.isalnum() else word
        return self.stems[word]

    def _pair(self, reference: "_Text", predicted: "_Text") -> list[float]:
        sizes = len(reference.tokens), len(predicted.tokens)
        one_sentence = len(reference.sentences) <= 1 and len(predicted.sentences) <= 1
        longest: float | None = None
        scores = []
        for name in self.types:
            if name == "rougeL" or (name == "rougeLsum" and one_sentence):
                if longest is None:
                    longest = _f_measure(lcs_length(reference.tokens, predicted.tokens), *sizes)
                scores.append(longest)
            elif name == "rougeLsum":
                scores.append(_summary_f_measure(reference.sentences, predicted.sentences))
            else:
                scores.append(_f_measure(*_overlap(reference.ngrams[int(name[5:])], predicted.ngrams[int(name[5:])])))
        return scores


class _Text:
    """A text's words, n-grams and sentences, each made once."""

    def __init__(self, scorer: _Scorer, text: str, turkic: bool):
        self.tokens = scorer.words(text, turkic)
        self.ngrams = {order: scripts.ngrams(self.tokens, order) for order in scorer.orders}
        self.sentences = [self.tokens]
        if "rougeLsum" in scorer.types:
            lines = scripts.sentences(text) if scorer.split_summaries else text.split("\n")
            if len(lines) > 1:
                self.sentences = [scorer.words(line, turkic) for line in lines]


def _overlap(reference: Counter[Any], predicted: Counter[Any]) -> tuple[int, int, int]:
    hits = sum(min(count, predicted[ngram]) for ngram, count in reference.items() if ngram in predicted)
    return hits, reference.total(), predicted.total()


def _f_measure(hits: int, reference: int, predicted: int) -> float:
    """Return the harmonic mean of hits / predicted and hits / reference."""
    return 2 * hits / (reference + predicted) if hits else 0.0


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, a whole row of its table in each step (Hyyrö 2004).

    Bit j of a row is 0 where the row's length grows at the j-th token of `second`.
    """
    masks = _masks(second)
    row = (1 << len(second)) - 1
    for token in first:
        if token in masks:
            row = _next_row(row, masks[token], len(second))
    return len(second) - row.bit_count()


def _masks(tokens: Sequence[str]) -> dict[str, int]:
    """Return, of each token, the bits of the places where it stands."""
    masks: dict[str, int] = {}
    for position, token in enumerate(tokens):
        masks[token] = masks.get(token, 0) | 1 << position
    return masks


def _next_row(row: int, mask: int, length: int) -> int:
    taken = row & mask
    return ((row + taken) | (row - taken)) & ((1 << length) - 1)


def _summary_f_measure(references: list[list[str]], predicted: list[list[str]]) -> float:
    """Score the tokens of each reference sentence that are in its LCS with any predicted one (Lin 2004, section 3.2).

    No token is hit more often than it stands in both texts, as in rouge_score and in ROUGE 1.5.5.
    """
    tables = [(len(sentence), _masks(sentence)) for sentence in predicted]
    left = _counts(references) & _counts(predicted)
    hits = 0
    for sentence in references:
        positions = set().union(*(_lcs_places(sentence, length, masks) for length, masks in tables))
        for position in sorted(positions):
            if left[sentence[position]] > 0:
                left[sentence[position]] -= 1
                hits += 1
    return _f_measure(hits, sum(map(len, references)), sum(map(len, predicted)))


def _counts(sentences: Iterable[list[str]]) -> Counter[str]:
    return Counter(token for sentence in sentences for token in sentence)


def _lcs_places(sentence: list[str], length: int, masks: dict[str, int]) -> list[int]:
    """Return the places in a sentence of its LCS with another, given as its length and masks.

    Of several LCS it must be rouge_score's. That walks back through the table of lengths t, from the last cell: where
    the tokens are alike it takes them, else it goes left if t[i][j - 1] > t[i - 1][j], else up. Rows are kept here as
    bits, whose sums give t back; rows of tokens that are nowhere in the other sentence can be left out, as there the
    walk always goes up.
    """
    positions = [position for position, token in enumerate(sentence) if token in masks]
    if not positions:
        return []
    rows = [(1 << length) - 1]
    for position in positions:
        rows.append(_next_row(rows[-1], masks[sentence[position]], length))
    taken = []
    row, column = len(positions), length
    while row and column:
        bit = 1 << (column - 1)
        if masks[sentence[positions[row - 1]]] & bit:
            taken.append(positions[row - 1])
            row, column = row - 1, column - 1
        elif rows[row] & bit and _length(rows[row], column) > _length(rows[row - 1], column):
            column -= 1
        else:
            row -= 1
    return taken


def _length(row: int, column: int) -> int:
    """Return the LCS length in a column of a row of bits."""
    return column - (row & ((1 << column) - 1)).bit_count()
