"""What all metrics share: their arguments, and statistics of rows that scores, intervals and tests are made of."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from hfkit.artifacts.manifest import Json, Metrics
from hfkit.errors import HfkitError, did_you_mean, shown
from hfkit.metrics.intervals import Combine, Difference, bootstrap, paired_test
from hfkit.version import __version__

TEXTS = Features({"predictions": Value("string"), "references": ListOf(Value("string"))})


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of each row the numbers whose sums make the scores.

    Args:
        values: (rows, k), float64.
        combine: the scores by name of sums of shape (k,), of all rows, of some, or of one.
        signature: which metric, with which options, by which versions of which libraries.
        details: the result of `compute`, where that is more than the scores.
    """

    values: np.ndarray
    combine: Combine
    signature: str
    details: Callable[[], dict[str, Any]] | None = None

    def scores(self) -> dict[str, float]:
        return self.combine(self.values.sum(axis=0))

    def row_scores(self) -> list[dict[str, float]]:
        """Return the scores of every row by itself."""
        return [self.combine(row) for row in self.values]

    def intervals(self, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Return the bootstrap interval of each score, see `bootstrap`."""
        return bootstrap(self.values, self.combine, samples, seed, level)

    def against(
        self, other: "Statistics", samples: int = 1000, seed: int = 0, level: float = 0.95
    ) -> dict[str, Difference]:
        """Return what these predictions have over others of the same rows, see `paired_test`.

        Raises:
            HfkitError: the others were scored otherwise.
        """
        if self.signature != other.signature:
            raise HfkitError(
                f"paired test: the two were scored as {other.signature} and as {self.signature}, must be the same; "
                "score both on the same rows with the same options (f1: with the same `labels`)"
            )
        return paired_test(other.values, self.values, self.combine, samples, seed, level)


class RowMetric(evaluate.Metric):
    """A metric that is made of statistics of rows. Nothing is downloaded, and nothing written in one process.

    A metric has `_statistics(predictions, references, *, <options>)`, with a list of references for each row.
    """

    _statistics: Callable[..., Statistics]

    row_features: Features | list[Features] = TEXTS
    about = ""
    # Whether a row with nothing but blank references can be scored: where they are overlapped with, it never can.
    takes_blank_references = False

    def __init__(self, num_process: int = 1, **settings: Any):
        settings.setdefault("keep_in_memory", num_process == 1)
        self._is_in_memory = settings["keep_in_memory"]
        super().__init__(num_process=num_process, **settings)
        self._last: Statistics | None = None

    def statistics(self, predictions: Sequence[Any], references: Any = None, **options: Any) -> Statistics:
        """Return the statistics of rows, for scores, row scores, intervals and paired tests at the cost of one.

        Args:
            predictions: one a row.
            references: one a row, or a list of them a row. Their numbers may differ.
            options: the metric's, as for `compute`.

        Raises:
            HfkitError: predictions, references or options are not what the metric takes.
        """
        self._check_options(options)
        predictions, references = self._checked(predictions, references)
        if not predictions:
            raise HfkitError("predictions: no rows to score; give at least one prediction")
        self._last = self._statistics(predictions, references, **options)
        return self._last

    def signature(self, **options: Any) -> str:
        """Return how scores were made, as sacrebleu tells it: of the last ones, or with options, as far as they
        tell."""
        self._check_options(options)
        if self._last is not None and not options:
            return self._last.signature
        return self._signature(self._all_options(options), None, None)

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> Metrics | None:
        """Return the scores, with the arguments, keys and scale of the `evaluate` metric of the same name."""
        self._check_options(options)
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:
            raise HfkitError("predictions: no rows to score; give `predictions`, or `add` them before")
        return super().compute(**options)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Add rows to those that `compute` scores."""
        predictions, references = self._checked(predictions, references)
        if not predictions:
            return
        columns = {"predictions": predictions, "references": references}
        super().add_batch(**{name: columns[name] for name in self._feature_names()}, **others)

    def add(self, *, prediction: Any = None, reference: Any = None, **others: Any) -> None:
        """Add a row to those that `compute` scores."""
        self.add_batch(predictions=[prediction], references=None if reference is None else [reference], **others)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.about, citation="", features=self.row_features)

    def _build_data_dir(self) -> str:
        # No folder where no file will be: the cache may be read-only.
        return "" if self._is_in_memory else super()._build_data_dir()

    def _compute(self, predictions: Any, references: Any = None, **options: Any) -> Metrics:
        statistics = self.statistics(
            list(predictions), references if references is None else list(references), **options
        )
        return statistics.details() if statistics.details else statistics.scores()

    def _signature(self, options: Json, references: list[Any] | None, tokenizers: str | None) -> str:
        """Return name:value of the number of references and of the options that are set, `tokenize` as sacrebleu's
        `tok`."""
        pairs = {"nrefs": nrefs(references)} if "references" in self._feature_names() else {}
        pairs |= {name: value for name, value in options.items() if value is not None and name != "tokenize"}
        if "tokenize" in options:
            pairs["tok"] = tokenizers or options["tokenize"] or "auto"
        pairs["version"] = f"hfkit-{__version__}"
        return "|".join([self.name, *(f"{name}:{_in_words(value)}" for name, value in pairs.items())])

    def _all_options(self, options: Json) -> Json:
        """Return the options with the defaults of those that are not given."""
        known = list(inspect.signature(self._statistics).parameters.values())[2:]
        return {option.name: options.get(option.name, option.default) for option in known}

    def _check_options(self, options: Json) -> None:
        known = self._all_options({})
        for name in options:
            if name not in known:
                raise HfkitError(f'{self.name}: has no option "{name}", {did_you_mean(name, known)}')

    def _checked(self, predictions: Any, references: Any) -> tuple[list[Any], list[Any]]:
        """Return predictions, and to each a list of references."""
        predictions = listed("predictions", predictions)
        for row, prediction in enumerate(predictions, 1):
            _check_text("predictions", row, prediction)
        if "references" not in self._feature_names():
            return predictions, []
        references = [[entry] if isinstance(entry, str) else entry for entry in listed("references", references)]
        check_counts(predictions, references)
        for row, several in enumerate(references, 1):
            if not isinstance(several, (list, tuple)):
                raise HfkitError(f"references: row {row} must be a text or a list of texts, got {shown(several)}")
            for text in several:
                _check_text("references", row, text)
        blank = [row for row, several in enumerate(references, 1) if not self._is_enough(several)]
        if blank:
            raise HfkitError(
                f"references: {len(blank)} of {len(references)} rows have none, the first is row {blank[0]}; "
                "give each row at least one, or leave these rows out"
            )
        return predictions, [list(several) for several in references]

    def _is_enough(self, references: Sequence[str]) -> bool:
        return bool(references) and (self.takes_blank_references or any(text.strip() for text in references))


def check_counts(predictions: list[Any], references: list[Any]) -> None:
    """Raise an HfkitError where there are not as many references as predictions."""
    if len(predictions) != len(references):
        raise HfkitError(
            f"references: {len(references)} for {len(predictions)} predictions, must be as many; "
            "give each prediction one reference or one list of references"
        )


def nrefs(references: list[Any] | None) -> int | str:
    """Return how many references rows have, in sacrebleu's words: `var` where that differs or is not known."""
    numbers = {len(several) if isinstance(several, list) else 1 for several in references or []}
    return numbers.pop() if len(numbers) == 1 else "var"


def listed(name: str, values: object) -> list[Any]:
    """Return the entries of rows, whatever holds them; raises an HfkitError where it is no list of any kind."""
    if values is None or isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise HfkitError(f"{name}: must be a list with one entry a row, got {shown(values)}")
    return list(values)


def _check_text(name: str, row: int, value: object) -> None:
    if not isinstance(value, str):
        raise HfkitError(f"{name}: row {row} must be text, got {shown(value)}")


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return getattr(value, "__name__", str(value))
