"""Tasks of lm-evaluation-harness (Gao et al. 2024), run on a model that is loaded already."""

import importlib.util
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfkit.artifacts.manifest import Json, Metrics
from hfkit.errors import HfkitError, did_you_mean, reason
from hfkit.evaluation.settings import Scoring
from hfkit.metrics.intervals import paired_test

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfkit.metrics.base import Difference

INSTALL = 'pip install "hfkit[lm-eval]"'
NORMAL_95 = 1.959964  # standard errors on either side of a mean
BOOTSTRAPS = 1000  # for the standard errors of what is no mean; the harness would draw 100,000


def problems(benchmarks: list[str]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the names of tasks, as problems of the recipe's keys."""
    if importlib.util.find_spec("lm_eval") is None:
        yield "benchmarks", f"are run by lm-evaluation-harness, which is not installed; {INSTALL}"
        return
    manager = _manager(benchmarks)
    for index, name in enumerate(benchmarks):
        if not Path(name).expanduser().is_dir() and name not in manager.all_tasks:
            rule = f"no task of lm-evaluation-harness and no folder, {did_you_mean(name, manager.all_tasks)}"
            yield f"benchmarks.{index}", f"{name}: is {rule}"
        elif Path(name).expanduser().is_dir() and not _tasks_in(name, manager):
            yield f"benchmarks.{index}", f"{name}: no YAML file in this folder describes a task (`task: <name>`)"


def run(
    benchmarks: list[str],
    scoring: Scoring,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    window: int,
) -> Metrics:
    """Run tasks by name, and all tasks of folders, on one process.

    Args:
        scoring: with `batch_size`, `limit` (the most rows of each task) and a task; the prompts of a chat go through
            the chat template.
        window: most tokens of a prompt with its answer.

    Returns:
        JSON: `scores`, by `<task>/<metric>` or `<task>/<metric>/<filter>`, each `value`, `stderr` or None, and `rows`,
        the values whose mean it is, or None; and `signatures`.

    Raises:
        HfkitError: in the harness's words, if a task cannot be run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    manager = _manager(benchmarks)
    names = [_tasks_in(name, manager) if Path(name).expanduser().is_dir() else [name] for name in benchmarks]
    try:
        lm = HFLM(
            pretrained=model.get_base_model() if isinstance(model, PeftModel) else model,  # its layers are adapted
            backend="seq2seq" if model.config.is_encoder_decoder else "causal",
            tokenizer=tokenizer,
            batch_size=scoring.batch_size,
            max_length=window,
        )
        tasks = _loaded(list(dict.fromkeys(sum(names, []))), manager)
        results = lm_eval.evaluate(
            lm,
            tasks,
            limit=scoring.limit,
            apply_chat_template=scoring.task.is_chat,
            bootstrap_iters=BOOTSTRAPS,
        )
    except Exception as error:  # tasks are code and data of many authors
        raise HfkitError(f"benchmarks: {', '.join(benchmarks)}: cannot be run: {reason(error)}") from error
    version, shots = lm_eval.__version__, results["n-shot"]
    signatures = [
        f"lm-eval|task:{task}|version:{results['versions'].get(task)}|fewshot:{shots.get(task)}|lm_eval-{version}"
        for task in results["results"]
    ]
    return {"scores": _scores(results), "signatures": signatures}


def scores(report: Json, other: Json | None = None) -> dict[str, float]:
    """Return each score with `_low` and `_high`, the normal 95 % interval of the harness's standard error, where it
    has one; against another model's, where both are means of the same rows, also `_difference`, its interval and
    `_p`."""
    results: dict[str, float] = {}
    for name, score in report.get("scores", {}).items():
        results[name] = score["value"]
        if score["stderr"] is not None:
            results[f"{name}_low"] = score["value"] - NORMAL_95 * score["stderr"]
            results[f"{name}_high"] = score["value"] + NORMAL_95 * score["stderr"]
        theirs = (other or {}).get("scores", {}).get(name, {}).get("rows")
        if theirs is not None and score["rows"] is not None and len(theirs) == len(score["rows"]):
            test = _paired(score["rows"], theirs)
            results |= {
                f"{name}_difference": test.difference,
                f"{name}_difference_low": test.low,
                f"{name}_difference_high": test.high,
                f"{name}_p": test.p_value,
            }
    return results


def _paired(ours: list[float], theirs: list[float]) -> "Difference":
    a, b = (np.column_stack([np.ones(len(rows)), rows]) for rows in (theirs, ours))
    return paired_test(a, b, lambda sums: {"mean": float(sums[1] / sums[0])})["mean"]


def _manager(benchmarks: list[str]) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders: list[str | Path] = [
        Path(name).expanduser().resolve() for name in benchmarks if Path(name).expanduser().is_dir()
    ]
    return TaskManager(include_path=folders, include_defaults=len(folders) < len(benchmarks))


def _loaded(names: list[str], manager: "TaskManager") -> Any:
    """Return the tasks, seeded as `lm_eval.simple_evaluate` does it, which asks git and half the system about itself
    too."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = manager.load(names)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def _tasks_in(folder: str, manager: "TaskManager") -> list[str]:
    root = Path(folder).expanduser().resolve()
    index = manager.task_index
    return [name for name in manager.all_subtasks if root in (index[name].yaml_path or Path()).parents]


def _scores(report: Any) -> Metrics:
    entries: dict[str, Any] = {}
    for task, values in report["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            rows = [row[metric] for row in report["samples"].get(task, []) if row["filter"] == kind and metric in row]
            is_mean = (
                all(isinstance(row, int | float) for row in rows) and len(rows) and np.isclose(np.mean(rows), value)
            )
            entries[f"{task}/{metric}" + (f"/{kind}" if kind != "none" else "")] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) and np.isfinite(stderr) else None,
                "rows": [float(row) for row in rows] if is_mean else None,
            }
    return entries
