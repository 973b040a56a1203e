"""Prune a model, train it to recover, and tell what that has cost and saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from hfkit.artifacts.manifest import Metrics
from hfkit.compression.settings import Pruning, Recover, check_calibration, check_recover
from hfkit.data.corpus import Row
from hfkit.distillation.settings import Distillation
from hfkit.errors import refuse
from hfkit.evaluation.settings import ScoredRecipe, Scoring
from hfkit.metrics.catalogue import scores_of_training
from hfkit.recipe import limits
from hfkit.recipe.fields import Input, Push, ResolvedInputs
from hfkit.recipe.limits import Accept
from hfkit.runtime.distributed import on_main, say
from hfkit.training.settings import TRAIN, BadSteps

PRUNED, NOTE = "pruned", "pruning.json"  # the pruned model while it recovers, and what is known of it


class Recipe(ScoredRecipe):
    """A model with weights set to zero, or with fewer layers or channels; with `recover:` trained after that."""

    MAKES: ClassVar[str] = "model"
    DISTRIBUTED: ClassVar[bool] = True
    SUMMARY: ClassVar[str] = "A language model that was pruned{recovered}."

    stage: Literal["prune"]
    model: Annotated[str, Input("model")]
    data: Annotated[str, Input("data set")] = pydantic.Field(
        description="Its test split scores the models, its training split is what a recovery learns from."
    )
    pruning: Pruning
    calibration: Annotated[str | None, Input("data set")] = pydantic.Field(
        None, description="The text that shows which parts count, never that of the evaluation. Not for magnitude."
    )
    calibration_split: Literal["train", "validation", "test"] = "train"
    calibration_rows: int = pydantic.Field(128, ge=1, description="Rows of `sequence_length` tokens of that text.")
    sequence_length: int = pydantic.Field(512, ge=8, description="Tokens in a row.")
    recover: Recover | None = None
    train: Annotated[dict[str, Any] | None, TRAIN] = None
    bad_steps: BadSteps = pydantic.Field(BadSteps(), description="What to do about steps whose numbers are bad.")
    accept: Accept = {}
    push: Push | None = None

    @pydantic.model_validator(mode="after")
    def _keys_that_fit(self) -> "Recipe":
        if self.recover is not None and self.train is None:
            raise ValueError(
                "recover=...: does not say how long to train; add `train:` with max_steps or num_train_epochs"
            )
        if self.recover is None and self.train is not None:
            raise ValueError("train=...: nothing is trained; add `recover: {}`, or delete the key")
        if self.recover is not None and self.as_task().has_classes:
            raise ValueError("recover=...: classifiers are not recovered here; fine-tune the result")
        return self

    def recovery(self) -> Distillation:
        """Return what the training after the pruning is told."""
        assert self.recover is not None and self.train is not None, "a recovery has a training"
        return Distillation(
            task=self.as_task(),
            student={},
            train=self.train,
            losses=self.recover.losses,
            sequence_length=self.sequence_length,
            packing=self.recover.packing,
            generation=self.generation,
            optimizer=self.recover.optimizer,
            bad_steps=self.bad_steps,
            trust_remote_code=self.trust_remote_code,
        )


def check(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[tuple[str, str]]:
    """Check what can be known before a weight is loaded."""
    from hfkit.evaluation import checks

    scoring, pruning = recipe.scoring(), recipe.pruning
    task = scoring.task
    yield from limits.check_best(recipe.train, scores_of_training(task.measured_by))
    splits = (recipe.calibration_split, recipe.split)
    yield from check_calibration(task, inputs, *splits, pruning.needs_data, pruning.method)
    if recipe.recover is not None:
        yield from check_recover(recipe.recover)
    yield from checks.of_smaller(scoring, inputs, recipe.accept, lambda path: _problems_with(path, recipe))


def _problems_with(path: str, recipe: Recipe) -> Iterator[tuple[str, str]]:
    from hfkit.compression.pruning import problems_with

    settings = (recipe.pruning, recipe.recover, recipe.sequence_length)
    return problems_with(path, *settings, recipe.as_task().has_classes, recipe.trust_remote_code)


def run(recipe: Recipe, inputs: ResolvedInputs, output: Path) -> Metrics:
    from transformers.utils import logging

    from hfkit.data import corpus
    from hfkit.evaluation import checks

    # Everything that can be wrong with what is there now, before a weight is loaded
    logging.disable_progress_bar()
    scoring, before = recipe.scoring(), inputs["model"].path
    rows = corpus.read_split(inputs["data"].path, recipe.split, recipe.limit)
    refuse(_problems_with(before, recipe))
    checks.refuse(scoring, rows, {"model": before})

    # The pruned model; a recovery that goes on finds it there
    facts = on_main("prune", lambda: _prune(recipe, inputs, rows, output))
    models = {"before": before, "pruned": str(output / PRUNED)}
    if recipe.pruning.is_mask:
        say(f"  {facts['zeros']:.1%} of the matrices' weights are 0: sparse, same size, same speed")

    # The training after that
    if recipe.recover is not None:
        from hfkit.compression.recovery import recover

        say("\n  Recovering, with the model before as the teacher" if recipe.recover.has_teacher else "\n  Recovering")
        has_teacher, has_masks = recipe.recover.has_teacher, recipe.pruning.is_mask
        settings, pruned = recipe.recovery(), output / PRUNED
        facts |= recover(settings, pruned, inputs["data"].path, before, output, has_teacher, has_masks)
        models["recovered"] = str(output)

    # Beside the model that it was
    return on_main("close", lambda: _close(recipe, scoring, rows, models, facts, output))


def _prune(recipe: Recipe, inputs: ResolvedInputs, rows: list[Row], output: Path) -> Metrics:
    """Make the folder of the pruned model, unless this recipe's is there. Returns what is to be said of it."""
    import shutil

    from hfkit.artifacts import manifest
    from hfkit.compression import calibration, pruning
    from hfkit.compression.whole import whole
    from hfkit.data.chat import set_generation_ids
    from hfkit.data.tokenizer import load_tokenizer
    from hfkit.model.loading import open_model

    task, folder, started = recipe.as_task(), output / PRUNED, manifest.read_json(output, manifest.STARTED) or {}
    made_of = {key: started.get(key) for key in ("fingerprint", "inputs")}
    note = manifest.read_json(output, NOTE) or {}
    if note.get("made_of") == made_of:
        return note["facts"]
    shutil.rmtree(folder, ignore_errors=True)  # half made, or of a recipe that was changed since
    with manifest.new_folder(folder) as work, whole(inputs["model"].path, task, output) as (path, drift):
        tokenizer = load_tokenizer(path, task.tokenizer_use, task.chat_template)
        tokens = None
        if recipe.pruning.needs_data:
            texts = calibration.texts_of(task, inputs["calibration"].path, recipe.calibration_split, rows)
            tokens = calibration.calibration_rows(texts, tokenizer, recipe.sequence_length, recipe.calibration_rows)
        model = open_model(path, task.has_classes, recipe.trust_remote_code)
        model, facts = pruning.prune(model, recipe.pruning, tokens)
        if not task.has_classes:
            set_generation_ids(model, tokenizer, task.is_chat)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    manifest.write_json(output / NOTE, {"made_of": made_of, "facts": facts | drift})
    return facts | drift


def _close(
    recipe: Recipe,
    scoring: Scoring,
    rows: list[Row],
    models: dict[str, str],
    facts: Metrics,
    output: Path,
) -> Metrics:
    """Measure the models, and leave the last one alone in the folder."""
    import shutil

    from hfkit.evaluation import comparison
    from hfkit.reports import comparison as report

    result = comparison.compared(scoring, rows, models)
    say(report.screen(result))
    metrics = comparison.beside_base(result, recipe.accept) | facts
    if recipe.recover is not None:
        scores = report.score_names(result["models"][1])
        metrics |= {f"unrecovered_{name}": result["models"][1][name] for name in scores}
    else:
        for path in (output / PRUNED).iterdir():
            path.replace(output / path.name)
    shutil.rmtree(output / PRUNED)
    (output / NOTE).unlink()
    return metrics
