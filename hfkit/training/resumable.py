"""transformers' Trainer, resumable: committed checkpoints, exact resumption, signals, steps with bad numbers."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import _is_peft_model
from transformers.trainer_utils import TrainOutput

from hfkit import manifest, stopping
from hfkit.errors import HfkitError
from hfkit.ranks import is_main, on_main, say
from hfkit.training import checkpoints, trackers
from hfkit.training.bad_steps import StepGuard
from hfkit.training.order import EpochOrder
from hfkit.training.settings import BadSteps


class StoppedInEvaluation(stopping.Stopped):
    """Evaluation was left: the run commits the step before it, and evaluates when it goes on."""


@dataclasses.dataclass
class Progress:
    """What a checkpoint keeps beside Trainer's own state, one file a process."""

    guard: dict[str, Any]
    logged_step: int  # of the last log
    loss_since: float  # sum of the losses of this process since then
    loss_before: float  # sum of the losses until then
    skipped_since: int
    train_seconds: float
    is_evaluation_due: bool  # the run was stopped in the evaluation of this step


class ResumableTrainer(Trainer):
    """Trainer that may be killed at any time.

    Its checkpoints are committed (`hfkit.training.checkpoints`), a run that goes on from one computes what it would
    have computed without, a signal is answered with a checkpoint at the end of the step, and a step with bad numbers
    never reaches the weights.

    Attributes:
        pauses: seconds spent in evaluation and saving, which no training speed should contain.
        train_seconds: of the training, those before the checkpoint it went on from included.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, bad_steps: BadSteps | None = None, **kwargs: Any):
        trackers.take_up(args)
        super().__init__(model, args, **kwargs)
        self.optimizer: torch.optim.Optimizer | None
        self.control: TrainerControl
        self.guard = StepGuard(bad_steps or BadSteps())
        self.pauses = 0.0
        self.train_seconds = 0.0
        self._resume_from: Path | None = None
        self._commit: checkpoints.Commit | None = None
        self._order: EpochOrder | None = None
        self._loss_at_step_begin: torch.Tensor | None = None
        self._logged_step = self._skipped_since_log = 0
        self._bad: str | None = None  # what was wrong with the step that was just left out
        self._is_stopping = self._is_evaluation_due = False
        if self.is_deepspeed_enabled:
            say("  DeepSpeed updates the weights inside its backward pass: bad steps are told, but not left out")

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
            with stopping.patient():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                if self._is_evaluation_due:  # of the last step of all
                    self._catch_up_evaluation()
                self._wait_for_commit()
                self.train_seconds += time.perf_counter() - self._begun
                if self._agree_to_stop():
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
        if self._resume_from is not None:
            self._restore(self._resume_from)
            self._resume_from = None
        if self._is_evaluation_due:
            self._catch_up_evaluation()
        if self.state.global_step >= self.state.max_steps:  # Trainer would look after the next step only
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _restore(self, checkpoint: Path) -> None:
        found = manifest.read_json(checkpoint, f"progress_{self.args.process_index}.json")
        if found is None:  # more processes than before: what was not yet logged is lost to the log
            found = {**(manifest.read_json(checkpoint, "progress_0.json") or {}), "loss_since": 0.0}
        progress = Progress(**found)
        self.guard = StepGuard(self.guard.settings, **progress.guard)
        self._logged_step = self._globalstep_last_logged = progress.logged_step
        self._tr_loss.fill_(progress.loss_since)
        self._total_loss_scalar = progress.loss_before
        self._skipped_since_log = progress.skipped_since
        self.train_seconds = progress.train_seconds
        self._is_evaluation_due = progress.is_evaluation_due
        if self.state.best_global_step and self.args.load_best_model_at_end:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if not best.is_dir():
                raise HfkitError(f"{best}: the best checkpoint is gone; restore it, or add --fresh to begin again")
            self.state.best_model_checkpoint = str(best)

    def _catch_up_evaluation(self) -> None:
        self._is_evaluation_due = False
        self.control.should_evaluate = True
        self.control.should_log = self.control.should_save = False
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, 0.0)

    # ---- each step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._loss_at_step_begin is None:
            self._loss_at_step_begin = self._tr_loss.clone()
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called between the last backward pass of a step and the optimizer: here a bad step is left out.

        This waits for the device, once a step. All processes decide alike: they share what they have seen.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = self._tr_loss - self._loss_at_step_begin
        norm = torch.as_tensor(grad_norm, device=loss.device, dtype=torch.float32)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_asked = torch.tensor(stopping.requested() is not None, device=loss.device)
        seen = torch.stack([loss.isnan(), loss.isinf(), norm.isnan(), norm.isinf(), is_asked]).float()
        share = norm.nan_to_num(0.0, 0.0, 0.0) / self.args.world_size
        *flags, mean_norm = self.accelerator.reduce(torch.cat([seen, share[None]]), "sum").tolist()
        loss_is_nan, loss_is_inf, norm_is_nan, norm_is_inf, self._is_stopping = map(bool, flags)
        self._bad = self.guard.judge(
            math.nan if loss_is_nan else math.inf if loss_is_inf else 0.0,
            math.nan if norm_is_nan else math.inf if norm_is_inf else mean_norm,
        )
        if self._bad:
            self._tr_loss.copy_(self._loss_at_step_begin)
            self._skipped_since_log += 1
            # Without gradients no optimizer does anything, not even decay weights or moments.
            model.zero_grad(set_to_none=True)
            scaler = self.accelerator.scaler
            if scaler is not None and not (loss_is_nan or loss_is_inf) and scaler.get_scale() > 1:
                self.guard.in_a_row = 0  # fp16 is looking for its scale
        self._loss_at_step_begin = None
        return grad_norm

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self._bad:
            self._tell_bad_step()
        if self._is_stopping and self.control.should_evaluate:
            self._is_evaluation_due, self.control.should_evaluate = True, False
        self.control.should_save |= self._is_stopping
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except StoppedInEvaluation:
            self._is_evaluation_due = True
            self._save_checkpoint(model, None)

    def _tell_bad_step(self) -> None:
        reason, self._bad = self._bad, None
        limit, step = self.guard.settings.stop_after, self.state.global_step
        self.log({"skipped": reason, "skipped_steps": self.guard.skipped})
        if is_main():
            tqdm.write(f"  step {step} is left out: {reason} ({self.guard.in_a_row} in a row, {limit} stop the run)")
        if self.guard.is_exhausted:
            self._wait_for_commit()
            last = next(reversed(checkpoints.committed(Path(self.args.output_dir)).values()), None)
            raise HfkitError(
                f"{self.args.output_dir}: {limit} steps in a row were left out, up to step {step}: {reason}. "
                f"The weights are those after step {step - limit}; the last good checkpoint is "
                f"{last or 'not yet written'}.\n"
                f"  Lower train.learning_rate or train.max_grad_norm, or look for what is odd in the data; then "
                f"add --force to go on from that checkpoint with the changed recipe, or --fresh to begin again."
            )

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps = self.state.global_step - self._logged_step
            good = steps - self._skipped_since_log
            if self._skipped_since_log:  # Trainer has divided by all steps
                loss = logs.pop("loss")
                logs |= {"loss": loss * steps / good} if good else {}
                logs["skipped_steps"] = self.guard.skipped
            self._logged_step, self._skipped_since_log = self.state.global_step, 0
        super().log(logs, start_time)

    def _agree_to_stop(self) -> bool:
        """Whether any process was asked to stop."""
        is_asked = stopping.requested() is not None
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
            best = self.state.best_global_step or None
            needed = self._checkpoint_bytes(run)
            self._commit = checkpoints.commit(
                run, step, self._write_checkpoint, needed, self.args.save_total_limit, best
            )
            if best is not None:
                self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")
        if self._is_stopping or self._agree_to_stop():
            name = stopping.requested() or "a signal to another process"
            is_there = self._wait_for_commit()
            kept = f"the checkpoint of step {step} is committed" if is_there else f"step {step} could not be saved"
            raise stopping.Stopped(f"{name}: {kept}")

    def _wait_for_commit(self) -> bool:
        return self._commit is None or self._commit.wait()

    def _write_checkpoint(self, folder: Path) -> None:
        """Everything of a checkpoint into an empty folder; on every process, each with its part."""
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        guard = {"skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row, "norms": self.guard.norms}
        progress = Progress(
            guard=guard,
            logged_step=self._logged_step,
            loss_since=self._tr_loss.item(),
            loss_before=self._total_loss_scalar,
            skipped_since=self._skipped_since_log,
            train_seconds=self.train_seconds + time.perf_counter() - self._begun,
            is_evaluation_due=self._is_evaluation_due,
        )
        manifest.write_json(folder / f"progress_{self.args.process_index}.json", dataclasses.asdict(progress))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _checkpoint_bytes(self, run: Path) -> int:
        """How much room the next checkpoint takes: what the last one took, or what there is to write."""
        if there := checkpoints.committed(run):
            newest = next(reversed(there.values()))
            return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        saved = [
            tensor for tensor in self.model.parameters() if tensor.requires_grad or not _is_peft_model(self.model)
        ]
        states = self.optimizer.state.values() if self.optimizer is not None else []
        kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in [*saved, *kept])

    def _load_best_model(self) -> None:
        self._wait_for_commit()
        best = Path(self.state.best_model_checkpoint or "")
        if problems := on_main("best", lambda: checkpoints.problems_with(best)):
            raise HfkitError(f"{best}: the best checkpoint is damaged ({'; '.join(problems)}); restore it")
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments: nothing reads it, and it may hold a token.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


@contextlib.contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Training draws the same random numbers, whether there was an evaluation or not."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            yield
    else:
        with torch.random.fork_rng([device], device_type=device.type):
            yield
