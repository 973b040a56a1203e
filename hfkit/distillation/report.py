"""What a distillation was worth: the student beside its teacher, and beside itself without a teacher."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfkit.artifacts import manifest
from hfkit.artifacts.cache import beside, path_of
from hfkit.artifacts.manifest import Metrics
from hfkit.distillation.data import TrainingData
from hfkit.metrics.catalogue import of_answers
from hfkit.runtime.distributed import on_main
from hfkit.training.callbacks import read_log, speed_lines
from hfkit.training.task_metrics import TaskMetrics
from hfkit.training.trainer import HfkitTrainer

ALONE = "alone"  # the folder in which the student without a teacher is trained
Scores = dict[str, float]
COLUMNS = {"teacher": "teacher", "student": "student", "alone": "without teacher"}


def scores(trainer: HfkitTrainer, data: TrainingData, task_metrics: TaskMetrics) -> Scores:
    """Return the scores of the model that was trained: on test, and `validation_*`; of a task also of what it
    generates."""
    metrics = trainer.token_metrics(data.test, "evaluating test")
    validation = trainer.token_metrics(data.validation, "evaluating validation")
    metrics |= {f"validation_{name}": value for name, value in validation.items()}
    if task_metrics.task.has_answers:
        metrics |= task_metrics(trainer.model, "test")
    return metrics | {"parameters": trainer.model.num_parameters()}


def teacher_scores(
    trainer: HfkitTrainer,
    teacher: Callable[[], PreTrainedModel],
    data: TrainingData,
    task_metrics: TaskMetrics,
    packing: str,
    teacher_path: str,
    output: Path,
) -> Scores:
    """Return the scores of the teacher, kept beside the tokenized data: a later run need not load it.

    Args:
        teacher: loads the model; called only if its scores are not known.
    """
    task, settings = task_metrics.task, task_metrics
    made_from: list[Any] = [manifest.content_of(teacher_path), manifest.content_of(settings.data)]
    made_from += [task.name, task.prompt, task.completion, task.messages]
    made_from += [settings.generation, settings.window, settings.count, packing]
    digest = hashlib.sha256(json.dumps([*made_from, trainer.args.bf16], default=str).encode()).hexdigest()
    path = path_of(beside(output), "teacher", digest, ".json")
    if stored := on_main("teacher known", lambda: manifest.read_json(path.parent, path.name)):
        return stored
    model = trainer.accelerator.prepare_model(teacher(), evaluation_mode=True)
    metrics: Scores = {}
    for split, prefix in (("test", ""), ("validation", "validation_")):
        losses = trainer.token_metrics(data.of_teacher[split], f"teacher on {split}", model)
        metrics |= {f"{prefix}{name}": value for name, value in losses.items()}
    if task.has_answers:
        metrics |= task_metrics(model, "test")
    metrics["parameters"] = model.num_parameters()
    on_main("write teacher", lambda: manifest.write_json(path, metrics))
    return metrics


def gap_closed(teacher: float, student: float, alone: float) -> float | None:
    """Return the share of the way from the student without a teacher to the teacher that distillation went, by a loss:
    (alone - student) / (alone - teacher). None where the teacher is not better than that student."""
    return (alone - student) / (alone - teacher) if alone > teacher else None


def compared(scores: dict[str, Scores]) -> Metrics:
    """Return what `metrics.json` says: the student's own scores, `teacher_*` and `alone_*`, and what they come to.

    `retention` is the share of the teacher's quality that the student keeps, 1 for all of it: of scores such as
    ROUGE-L student / teacher, of bits per byte teacher / student.
    """
    teacher, student = scores["teacher"], scores["student"]
    metrics: dict[str, Any] = dict(student)
    for whose in ("teacher", "alone"):
        metrics |= {f"{whose}_{name}": value for name, value in scores.get(whose, {}).items()}
    metrics["retention_bits_per_byte"] = teacher["bits_per_byte"] / student["bits_per_byte"]
    for name in of_answers():
        if teacher.get(name):
            metrics[f"retention_{name}"] = student[name] / teacher[name]
    metrics["retention"] = metrics.get("retention_rougeL", metrics["retention_bits_per_byte"])
    if "alone" in scores:
        losses = [scores[whose]["bits_per_byte"] for whose in ("teacher", "student", "alone")]
        metrics["gap_closed"] = gap_closed(*losses)
    return metrics


def summary(metrics: Metrics, scores: dict[str, Scores], output: Path) -> str:
    """Return the result for someone who has never distilled a model."""
    columns = [whose for whose in COLUMNS if whose in scores]
    lines = ["", f"  {'test':<16}" + "".join(f"{COLUMNS[whose]:>17}" for whose in columns)]
    rows = {"loss": ".3f", "perplexity": ".2f", "bits_per_byte": ".3f", **dict.fromkeys(of_answers(), ".4g")}
    for name, form in {**rows, "parameters": ",.0f"}.items():
        if name in scores["student"]:
            cells = (format(scores[whose][name], form) for whose in columns)
            lines.append(f"  {name.replace('_', ' '):<16}" + "".join(f"{cell:>17}" for cell in cells))
    lines.append("")
    smaller = scores["student"]["parameters"] / scores["teacher"]["parameters"]
    quality = "its ROUGE-L" if "retention_rougeL" in metrics else "its quality, by bits per byte"
    retention = f"keeps {metrics['retention']:.1%} of {quality} (retention)."
    lines.append(f"  The student has {smaller:.0%} of the teacher's parameters, and {retention}")
    if "alone" in scores:
        closed = metrics["gap_closed"]
        if closed is None:
            lines.append("  The same student without a teacher is as good as the teacher: there was nothing to gain.")
        else:
            lines.append(
                f"  Distillation closed {closed:.0%} of the gap between training without a teacher and the teacher "
                f"(gap_closed)."
            )
    lines.append("")
    if "targets_bytes_per_token" in metrics:
        lines.append(f"  the teacher's targets take {metrics['targets_bytes_per_token']:.0f} bytes a token")
    lines += speed_lines(metrics)
    return "\n".join([*lines, f"  {metrics['size_bytes'] / 1e6:,.1f} MB; everything is in {output}/"])


def close(output: Path, teacher: Scores) -> None:
    """Draw `loss.png`, the curves of both students and the teacher's loss, and remove the folder of the other one."""
    from hfkit.training.callbacks import draw_loss

    lone = read_log(output / ALONE / "metrics.jsonl")
    draw_loss(read_log(output / "metrics.jsonl"), output / "loss.png", lone, teacher["validation_loss"])
    shutil.rmtree(output / ALONE, ignore_errors=True)
