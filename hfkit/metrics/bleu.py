"""BLEU (Papineni et al. 2002) and chrF (Popović 2015), over sacrebleu (Post 2018)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hfkit.artifacts.manifest import Json, Metrics
from hfkit.errors import HfkitError, did_you_mean
from hfkit.metrics import scripts
from hfkit.metrics.base import RowMetric, Statistics, nrefs


def _tokenizer_names(tokenize: str, references: list[Any]) -> list[str]:
    """Return sacrebleu's tokenizer of each row."""
    names = [scripts.bleu_name(several) if tokenize == "auto" else tokenize for several in references]
    for name in set(names):
        scripts.bleu_tokenizer(name)  # tells of one that is not known or not installed
    return names


class Bleu(RowMetric):
    """BLEU 0 to 1, as `evaluate`'s bleu, which is Tensor2Tensor's: no smoothing, the shortest reference counts.

    Orders for which no prediction is long enough are left out: `evaluate` scores 0 there, even identical text.
    """

    about = "BLEU: precision of n-grams, with a penalty for brevity (Papineni et al. 2002), 0 to 1."

    def _statistics(
        self,
        predictions: list[str],
        references: list[Any],
        *,
        tokenizer: scripts.Tokenizer | None = None,
        max_order: int = 4,
        smooth: bool = False,
        tokenize: str = "auto",
    ) -> Statistics:
        """Return lengths of prediction and reference, then matches of each order, then n-grams of each order.

        Args:
            tokenizer: what makes tokens of a text.
            max_order: the longest n-grams.
            smooth: whether 1 is added to the numbers of all n-grams (Lin and Och 2004).
            tokenize: the tokenizer's name: `auto` or one of sacrebleu's.
        """
        if max_order < 1:
            raise HfkitError(f"max_order: must be at least 1, got {max_order}; 4 is usual")
        options: dict[str, Any] = {"max_order": max_order, "smooth": smooth}
        if tokenizer is None:
            names = _tokenizer_names(tokenize or "auto", references)
            cuts = [scripts.tokenizer(name) for name in names]
            signature = self._signature(options | {"tokenize": tokenize}, references, "+".join(sorted(set(names))))
        else:
            cuts = [tokenizer] * len(predictions)
            signature = self._signature(options | {"tokenizer": tokenizer}, references, None)
        values = [
            _matches(list(cut(prediction)), [list(cut(reference)) for reference in several], max_order)
            for cut, prediction, several in zip(cuts, predictions, references, strict=True)
        ]

        def combine(sums: np.ndarray) -> dict[str, float]:
            return {"bleu": _bleu(sums, max_order, smooth)["bleu"]}

        array = np.array(values, dtype=np.float64)
        return Statistics(array, combine, signature, lambda: _bleu(array.sum(axis=0), max_order, smooth))


def _matches(predicted: list[str], references: list[list[str]], max_order: int) -> list[int]:
    matched = []
    for order in range(1, max_order + 1):
        candidates = [scripts.ngrams(reference, order) for reference in references]
        counts = scripts.ngrams(predicted, order).items()
        matched.append(sum(min(count, max(reference[ngram] for reference in candidates)) for ngram, count in counts))
    possible = [max(0, len(predicted) - order) for order in range(max_order)]
    return [len(predicted), min(map(len, references)), *matched, *possible]


def _bleu(sums: np.ndarray, max_order: int, smooth: bool) -> Metrics:
    length, reference_length = int(sums[0]), int(sums[1])
    matched, possible = sums[2 : 2 + max_order], sums[2 + max_order :]
    if smooth:
        precisions = [float((hits + 1) / (total + 1)) for hits, total in zip(matched, possible, strict=True)]
        counted = precisions
    else:
        precisions = [float(hits / total) if total else 0.0 for hits, total in zip(matched, possible, strict=True)]
        counted = [precision for precision, total in zip(precisions, possible, strict=True) if total]
    mean = math.exp(sum(map(math.log, counted)) / len(counted)) if counted and min(counted) > 0 else 0.0
    penalty = 0.0 if not length else min(1.0, math.exp(1 - reference_length / length))
    return {
        "bleu": mean * penalty,
        "precisions": precisions,
        "brevity_penalty": penalty,
        "length_ratio": length / reference_length if reference_length else 0.0,
        "translation_length": length,
        "reference_length": reference_length,
    }


class Sacrebleu(RowMetric):
    """BLEU 0 to 100 of sacrebleu, exactly.

    `use_effective_order` is on unless it is turned off: it matters only where no prediction has as many tokens as the
    longest n-gram, in which case identical text would score 0; and for the scores of single rows.
    """

    about = "sacreBLEU: BLEU that can be compared (Post 2018), 0 to 100."

    def _statistics(
        self,
        predictions: list[str],
        references: list[Any],
        *,
        smooth_method: str = "exp",
        smooth_value: float | None = None,
        force: bool = False,
        lowercase: bool = False,
        tokenize: str | None = "auto",
        use_effective_order: bool = True,
    ) -> Statistics:
        """Return sacrebleu's: lengths of prediction and reference, matches of each order, n-grams of each order.

        Args:
            smooth_method: of precisions of 0: `exp`, `floor`, `add-k` or `none` (Chen and Cherry 2014).
            smooth_value: of `floor` and `add-k`.
            force: whether to take text that seems tokenized without a warning.
            lowercase: whether case is left out of account.
            tokenize: `auto` or one of sacrebleu's names.
            use_effective_order: whether orders without n-grams are left out.
        """
        from sacrebleu.metrics.bleu import BLEU

        if smooth_method not in BLEU.SMOOTH_DEFAULTS:
            known = did_you_mean(str(smooth_method), BLEU.SMOOTH_DEFAULTS)
            raise HfkitError(f'smooth_method: "{smooth_method}" is not known, {known}')
        names = _tokenizer_names(tokenize or "auto", references)
        scorers = {
            name: BLEU(
                lowercase=lowercase,
                force=force,
                tokenize=name,
                smooth_method=smooth_method,
                smooth_value=smooth_value,
                effective_order=use_effective_order,
            )
            for name in sorted(set(names))
        }
        array = np.zeros((len(predictions), 2 + 2 * BLEU(tokenize="none").max_ngram_order))
        for name, scorer in scorers.items():
            rows = [row for row, other in enumerate(names) if other == name]
            array[rows] = _extracted(scorer, predictions, references, rows)
        scorer = next(iter(scorers.values()))

        def scored(sums: np.ndarray) -> Any:
            return scorer._compute_score_from_stats([int(number) for number in sums])

        def details() -> Metrics:
            whole = scored(array.sum(axis=0))
            parts = ("counts", "totals", "precisions", "bp", "sys_len", "ref_len")
            return {"score": _at_most_100(whole.score)} | {part: getattr(whole, part) for part in parts}

        return Statistics(
            array,
            lambda sums: {"score": _at_most_100(scored(sums).score)},
            _sacrebleu_signature(self.name, scorer, references, tok="+".join(scorers)),
            details,
        )

    def _signature(self, options: Json, references: list[Any] | None, tokenizers: str | None) -> str:
        from sacrebleu.metrics.bleu import BLEU

        scorer_options = {name: options[name] for name in ("smooth_method", "smooth_value", "lowercase")}
        scorer = BLEU(effective_order=options["use_effective_order"], **scorer_options)
        return _sacrebleu_signature(self.name, scorer, references, tok=options["tokenize"] or "auto")


class Chrf(RowMetric):
    """chrF 0 to 100 of sacrebleu, exactly; chrF++ with `word_order=2`. It takes characters, of any script."""

    about = "chrF: overlap of character n-grams (Popović 2015), 0 to 100."

    def _statistics(
        self,
        predictions: list[str],
        references: list[Any],
        *,
        char_order: int = 6,
        word_order: int = 0,
        beta: int = 2,
        lowercase: bool = False,
        whitespace: bool = False,
        eps_smoothing: bool = False,
    ) -> Statistics:
        """Return sacrebleu's: of each order the n-grams of prediction and best reference, and the matches.

        Args:
            char_order: the longest n-grams of characters.
            word_order: the longest n-grams of words.
            beta: how many times as much recall counts as precision.
            lowercase: whether case is left out of account.
            whitespace: whether spaces are characters.
            eps_smoothing: whether orders without n-grams count as almost 0.
        """
        orders = {"char_order": char_order, "word_order": word_order, "beta": beta}
        settings = {"lowercase": lowercase, "whitespace": whitespace, "eps_smoothing": eps_smoothing}
        scorer = _chrf(orders | settings)
        array = np.array(_extracted(scorer, predictions, references, range(len(predictions))), dtype=np.float64)

        def combine(sums: np.ndarray) -> dict[str, float]:
            return {"score": _at_most_100(scorer._compute_f_score([int(number) for number in sums]))}

        signature = _sacrebleu_signature(self.name, scorer, references)
        return Statistics(array, combine, signature, lambda: combine(array.sum(axis=0)) | orders)

    def _signature(self, options: Json, references: list[Any] | None, tokenizers: str | None) -> str:
        return _sacrebleu_signature(self.name, _chrf(options), references)


def _chrf(options: Json) -> Any:
    from sacrebleu.metrics.chrf import CHRF

    for name, least in (("char_order", 1), ("word_order", 0), ("beta", 1)):
        if options[name] < least:
            raise HfkitError(f"{name}: must be at least {least}, got {options[name]}")
    return CHRF(**options)


def _extracted(scorer: Any, predictions: list[str], references: list[Any], rows: Sequence[int]) -> list[list[int]]:
    """Return sacrebleu's statistics of rows. It wants references by their number in a row, None where a row has
    fewer."""
    most = max(len(references[row]) for row in rows)
    padded = [[(references[row] + [None] * most)[position] for row in rows] for position in range(most)]
    return scorer._extract_corpus_statistics([predictions[row] for row in rows], padded)


def _sacrebleu_signature(name: str, scorer: Any, references: list[Any] | None, **changed: str) -> str:
    """Return sacrebleu's own, with the metric's name before it as in its reports."""
    count = nrefs(references)
    scorer.num_refs = -1 if count == "var" else count
    signature = scorer.get_signature()
    for key, value in changed.items():
        signature.update(key, value)
    return f"{name}|{signature}"


def _at_most_100(score: float) -> float:
    """Return a score without the last digit's rounding: 100.00000000000004 is 100."""
    return min(float(score), 100.0)
