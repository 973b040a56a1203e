"""The shape of every training: resumed from the newest checkpoint, watched, and what it took."""

from pathlib import Path

from hfkit.artifacts.manifest import Metrics
from hfkit.model.flops import training_flops_per_token
from hfkit.runtime.distributed import on_main, say, world_size
from hfkit.training import checkpoints
from hfkit.training.callbacks import Speed, watch
from hfkit.training.resumable import ResumableTrainer


def newest_checkpoint(output: Path) -> str | None:
    """Return the folder of the newest checkpoint that is whole. Call it on every process, before a model is made."""
    return on_main("resume", lambda: str(checkpoints.newest(output) or "")) or None


def fit(trainer: ResumableTrainer, output: Path, checkpoint: str | None, tokens_a_row: float, length: int) -> Metrics:
    """Train, and log each step in `metrics.jsonl` of the result's folder.

    Args:
        trainer: with what was decided for it.
        checkpoint: to resume from; None begins anew.
        tokens_a_row: of the training rows, the mean without padding.
        length: tokens of a row, which attention's FLOPs depend on.

    Returns:
        What was decided, tokens/s and the share of the measured peak, seconds, skipped steps, device and seed.
    """
    decided, args = trainer.decided, trainer.args
    flops = training_flops_per_token(trainer.accelerator.unwrap_model(trainer.model), length)
    tokens = int(decided["rows_a_step"] * tokens_a_row)
    speed = Speed(trainer, tokens, flops, decided["roof_flops"] * world_size())
    watch(trainer, speed, output / "metrics.jsonl")
    if checkpoint is not None:
        say(f"  resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        **decided,
        **speed.summary(),
        "train_seconds": round(trainer.train_seconds, 1),
        "skipped_steps": trainer.guard.skipped,
        "device": args.device.type,
        "seed": args.seed,
    }
