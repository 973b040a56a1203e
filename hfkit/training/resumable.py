"""transformers' Trainer, resumable: committed checkpoints, exact resumption, signals, steps with bad numbers."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerControl, TrainingArguments
from transformers.trainer import _is_peft_model
from transformers.trainer_utils import TrainOutput

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import Json
from hfkit.errors import HfkitError
from hfkit.runtime import signals
from hfkit.runtime.distributed import on_main, say
from hfkit.training import checkpoints, trackers
from hfkit.training.bad_steps import GuardedTrainer, StepGuard
from hfkit.training.compilation import compiled_layers
from hfkit.training.order import EpochOrder
from hfkit.training.progress import Progress, load_progress, save_progress
from hfkit.training.settings import BadSteps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoppedInEvaluation(signals.Stopped):
    """Evaluation was left: the run commits the step before it, and evaluates when it goes on."""


class ResumableTrainer(GuardedTrainer):
    """Trainer that may be killed at any time.

    Its checkpoints are committed (`hfkit.training.checkpoints`), a run that goes on from one computes what it would
    have computed without, a signal is answered with a checkpoint at the end of the step, and a step with bad numbers
    never reaches the weights.

    Attributes:
        pauses: seconds spent in evaluation and saving, which no training speed should contain.
        train_seconds: of the training, those before the checkpoint it went on from included.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        bad_steps: BadSteps | None = None,
        decided: Json | None = None,
        **kwargs: Any,
    ):
        """Take `decided`, what measuring decided, see `hfkit.training.decisions`."""
        trackers.take_up(args)
        super().__init__(model, args, bad_steps, **kwargs)
        self.decided = decided or {}
        self.optimizer: torch.optim.Optimizer | None
        self.lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
        self.control: TrainerControl
        self.pauses = 0.0
        self.train_seconds = 0.0
        self._resume_from: Path | None = None
        self._commit: checkpoints.Commit | None = None
        self._order: EpochOrder | None = None
        self._seen_step = -1  # the step whose end was seen
        self._is_evaluation_due = self._is_save_due = self._is_epoch_end_due = False
        self._learning_rate: float | None = None

    # ---- going on

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint that `checkpoints.newest` found where one is given.

        Raises:
            hfkit.stopping.Stopped: after a signal, when the checkpoint of the step is committed.
            HfkitError: after too many bad steps in a row.
        """
        self._resume_from = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        self._begun = time.perf_counter()
        try:
            with signals.patient(), compiled_layers(self.model, self.decided.get("torch_compile") == "layers"):
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                self._wait_for_commit()
                self.train_seconds += time.perf_counter() - self._begun
                if self.agree_to_stop():
                    self._save_checkpoint(self.model, None)
        finally:
            if self._commit is not None:
                self._commit.settle()
            trackers.let_go()
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential"):
            raise HfkitError(f"train.train_sampling_strategy={strategy}: only random and sequential can go on exactly")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._order = EpochOrder(rows, step, None if strategy == "sequential" else seed)
        return self._order

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self._order is not None:
            self._order.set_epoch(epoch)  # Accelerate loses it where it skips batches on several processes
        self._take_up()
        if self.state.global_step >= self.state.max_steps:  # Trainer would look after the next step only
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._take_up()  # a checkpoint of the very last step
        self._wait_for_commit()
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would remove the newest
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = keep

    def _take_up(self) -> None:
        """Restore, once, what the checkpoint keeps beside Trainer's own state, and what was still to be done at its
        step."""
        if self._resume_from is None:
            return
        progress = load_progress(self._resume_from, self.args.process_index, self.args.world_size)
        self._restore_best(self._resume_from)
        self._resume_from = None
        self.guard = StepGuard(self.guard.settings, **progress.guard)
        self._logged_step = self._globalstep_last_logged = progress.logged_step
        self._tr_loss.fill_(progress.loss_since)
        self._total_loss_scalar = progress.loss_before
        self._skipped_since_log = progress.skipped_since
        self._norm, self._learning_rate = torch.tensor(float(progress.norm)), progress.learning_rate
        self.train_seconds = progress.train_seconds
        self.state.compute_steps(self.args, self.state.max_steps)  # the recipe's, where it was forced to change
        self._seen_step = self.state.global_step
        if progress.is_evaluation_due:
            self.control.should_evaluate = True
            self.control.should_log, self.control.should_save = False, progress.is_save_due
            self._catch_up()
        if progress.is_epoch_end_due:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._catch_up()

    def _catch_up(self) -> None:
        self._maybe_log_save_evaluate(
            self._tr_loss,
            self._norm,
            self.model_wrapped,
            None,
            self.state.epoch,
            None,
            0.0,
            learning_rate=self._learning_rate,
        )

    def _restore_best(self, checkpoint: Path) -> None:
        """Raise an error where the best checkpoint is gone; Trainer would forget it."""
        state = manifest.read_json(checkpoint, "trainer_state.json") or {}
        if state.get("best_model_checkpoint"):
            best = Path(self.args.output_dir) / Path(state["best_model_checkpoint"]).name
            if not best.is_dir() and self.args.load_best_model_at_end:
                raise HfkitError(f"{best}: the best checkpoint is gone; restore it, or add --fresh to begin again")
            self.state.best_model_checkpoint = str(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the checkpoint's state, and keep the recipe's settings: they differ where that was forced."""
        if self.optimizer is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self._groups()]
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        for group, own in zip(self._groups(), settings, strict=True):
            group.update({key: value for key, value in own.items() if key != "lr"})
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.base_lrs = [own["initial_lr"] for own in settings]
            for group, factor in zip(self._groups(), scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer is not None else []

    # ---- each step

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: "PreTrainedModel", *args: Any, **kwargs: Any
    ) -> None:
        if self._bad:
            self._wait_for_commit()
            self._tell_bad_step()
        self._learning_rate = kwargs.get("learning_rate")
        is_step_end, self._seen_step = self._seen_step != self.state.global_step, self.state.global_step
        is_last = self.state.epoch == int(self.state.epoch or 0) or self.state.global_step >= self.state.max_steps
        self._is_epoch_end_due = is_step_end and is_last
        self._is_save_due = self.control.should_save
        if self._is_stopping and self.control.should_evaluate:
            self._is_evaluation_due, self.control.should_evaluate = True, False
        self.control.should_save |= self._is_stopping
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except StoppedInEvaluation:
            self._is_evaluation_due = True
            self._save_checkpoint(model, None)

    def agree_to_stop(self) -> bool:
        """Return whether any process was asked to stop."""
        is_asked = signals.requested() is not None
        if self.args.world_size == 1:
            return is_asked
        return bool(self.accelerator.reduce(torch.tensor(float(is_asked), device=self.args.device), "sum").item())

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time inside as not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.pauses += time.perf_counter() - start

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Commit a checkpoint, and end here if that is what a signal asked for."""
        step, run = self.state.global_step, Path(self.args.output_dir)
        with self.pause():
            self._wait_for_commit()
            on_main("trackers", lambda: trackers.note(run))
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(run / f"checkpoint-{step}")
            best = self.state.best_model_checkpoint
            self._commit = checkpoints.commit(
                run,
                step,
                self._write_checkpoint,
                self._checkpoint_bytes(run),
                self.args.save_total_limit,
                int(best.rpartition("-")[2]) if best else None,
            )
        if self._is_stopping or self.agree_to_stop():
            name = signals.requested() or "a signal to another process"
            is_there = self._wait_for_commit()
            outcome = f"the checkpoint of step {step} is committed" if is_there else f"step {step} could not be saved"
            raise signals.Stopped(f"{name}: {outcome}")

    def _wait_for_commit(self) -> bool:
        return self._commit is None or self._commit.wait()

    def _write_checkpoint(self, folder: Path) -> None:
        """Write everything of a checkpoint into an empty folder; on every process, each with its part."""
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        progress = Progress(
            guard={"skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row, "norms": self.guard.norms},
            logged_step=self._logged_step,
            loss_since=self._tr_loss.item(),
            mean_loss_since=self.accelerator.reduce(self._tr_loss.clone(), "mean").item(),
            processes=self.args.world_size,
            loss_before=self._total_loss_scalar,
            skipped_since=self._skipped_since_log,
            norm=repr(self._norm.item()),
            learning_rate=self._learning_rate,
            train_seconds=self.train_seconds + time.perf_counter() - self._begun,
            is_evaluation_due=self._is_evaluation_due,
            is_save_due=self._is_save_due,
            is_epoch_end_due=self._is_epoch_end_due,
        )
        save_progress(progress, folder, self.args.process_index)
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _checkpoint_bytes(self, run: Path) -> int:
        """Return how much room the next checkpoint takes: what the last one took, or what there is to write."""
        if newest := checkpoints.last(run):
            return checkpoints.size_of(newest)
        saved = [
            tensor for tensor in self.model.parameters() if tensor.requires_grad or not _is_peft_model(self.model)
        ]
        states = self.optimizer.state.values() if self.optimizer is not None else []
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in [*saved, *tensors])

    def _load_best_model(self) -> None:
        self._wait_for_commit()
        best = Path(self.state.best_model_checkpoint or "")
        if not best.is_dir():  # there was no room for it, which was told
            say(f"  WARNING: {best} is not there: the result is the model of the last step, not the best")
            return
        if problems := on_main("best", lambda: checkpoints.problems_with(best)):
            raise HfkitError(f"{best}: the best checkpoint is damaged ({'; '.join(problems)}); restore it")
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments: nothing reads it, and it may hold a token.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)
