"""Models measured one after the other, each in a process of its own: quality, answers, and what it costs."""

import os
import time
from itertools import islice
from logging import ERROR, getLogger
from pathlib import Path
from typing import NamedTuple

from hfkit.artifacts.manifest import Json, Metrics

getLogger("bitsandbytes").setLevel(ERROR)  # it speaks of kernels that it could not load
import bitsandbytes  # noqa: E402, F401 or else the first quantized model takes the time to load it

from hfkit.data import corpus  # noqa: E402
from hfkit.data.corpus import Row  # noqa: E402
from hfkit.data.tasks import Task  # noqa: E402
from hfkit.data.tasks.templates import without_end  # noqa: E402
from hfkit.errors import HfkitError  # noqa: E402
from hfkit.evaluation import costs  # noqa: E402
from hfkit.evaluation.inputs import Inputs, inputs_of  # noqa: E402
from hfkit.evaluation.outcomes import Outcome, outcome_of  # noqa: E402
from hfkit.evaluation.settings import Scoring  # noqa: E402
from hfkit.inference.generation import generate  # noqa: E402
from hfkit.model.loading import open_model  # noqa: E402
from hfkit.recipe import limits  # noqa: E402
from hfkit.runtime import isolated  # noqa: E402

SAMPLES, SAMPLE_TOKENS = 3, 48


class Measured(NamedTuple):
    """
    Args:
        costs: `limits.COSTS` by name; None where one is not known.
        samples: prompts, and what the model writes after them; none of a classifier.
        seconds: that the model itself took, loading included.
    """

    outcome: Outcome
    costs: dict[str, float | None]
    samples: list[tuple[str, str]]
    seconds: float


def measure(scoring: Scoring, rows: list[Row], path: str, prompts: list[str] | None = None) -> Measured:
    """Measure the model at `path` in a process that begins and ends with it, so that its memory is its own.

    Args:
        prompts: texts to go on with, for samples. By default the prompts of the first rows, or of whole texts the
            beginnings.

    Raises:
        HfkitError: for a model that cannot be measured, also where the system ended its process.
    """
    try:
        return isolated.call(f"{__name__}:_measure", scoring, rows, path, prompts)
    except isolated.Ended:
        raise HfkitError(f"{path}: the process that measured it was killed, probably out of memory") from None


def costs_of(scoring: Scoring, path: str, data: str) -> dict[str, float | None]:
    """Return `limits.COSTS` of the model at `path`, that does a task on prepared data."""
    return measure(scoring, list(islice(corpus.rows(data, "test"), SAMPLES)), path).costs


def judge(
    accept: dict[str, str],
    metrics: Metrics,
    base: Metrics,
    scoring: Scoring,
    data: str,
    result: Path,
    base_place: str,
) -> list[Json]:
    """Return the limits of a training beside what was measured; where they are on costs, these are measured now.

    Args:
        base: what was measured of the model that `x base` means, which is at `base_place`.
    """
    if not set(accept) & set(limits.COSTS):
        return limits.judged(accept, metrics, base)
    own, other = (costs_of(scoring, path, data) for path in (str(result), base_place))
    return limits.judged(accept, metrics | own, base | other)


def _measure(scoring: Scoring, rows: list[Row], path: str, prompts: list[str] | None) -> Measured:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in ("RANK", "WORLD_SIZE"):  # the launcher's, of the processes that train: this one is alone
        os.environ.pop(name, None)
    inputs = inputs_of(scoring, rows, path)
    memory, start = costs.Memory(), time.perf_counter()
    model = open_model(path, scoring.task.has_classes, scoring.trust_remote_code)
    of_model: dict[str, float | None] = {"load_seconds": time.perf_counter() - start}

    tokenizer, samples = inputs.tokenizer, list[tuple[str, str]]()
    beginnings = _beginnings(scoring.task, rows, inputs, prompts)
    if scoring.task.has_classes:
        of_model |= costs.reading_speeds(model, max(beginnings, key=len))
    else:
        of_model |= costs.speeds(model, tokenizer, max(beginnings, key=len), inputs.window)
        options = {"max_new_tokens": min(SAMPLE_TOKENS, inputs.window // 2)}
        texts = generate(model, tokenizer, beginnings, len(beginnings), options, "samples")
        shown = (tokenizer.decode(ids, skip_special_tokens=True) for ids in beginnings)
        samples = list(zip(shown, texts, strict=True))
    of_model |= {"memory_bytes": memory.peak(), "parameters": model.num_parameters()}
    of_model["size_bytes"] = costs.size_on_disk(path)
    return Measured(outcome_of(scoring, model, inputs), of_model, samples, time.perf_counter() - start)


def _beginnings(task: Task, rows: list[Row], inputs: Inputs, prompts: list[str] | None) -> list[list[int]]:
    """Return what the model continues, as token ids that leave room for it."""
    room = inputs.window - min(SAMPLE_TOKENS, inputs.window // 2)
    if prompts is None:
        return [task.beginning(row, inputs.tokenizer, room) for row in rows[:SAMPLES]]
    return [without_end(inputs.tokenizer(text)["input_ids"][:room], inputs.tokenizer) for text in prompts]
