"""The loop of every evaluation of a training: rows over all processes, each counted once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hfkit.runtime.bars import Bar
from hfkit.training.resumable import ResumableTrainer, StoppedInEvaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


@torch.no_grad()
def over_rows(
    trainer: ResumableTrainer,
    rows: torch.utils.data.Dataset,
    title: str,
    of_batch: Callable[["PreTrainedModel", Batch], tuple[torch.Tensor, ...]],
    model: "PreTrainedModel | None" = None,
) -> list[torch.Tensor]:
    """Return what `of_batch` gives for all rows, on the CPU: tensors whose first dimension is that of the rows.

    Args:
        of_batch: of a model and a batch, tensors with an entry a row.
        model: by default the one that is trained.

    Raises:
        StoppedInEvaluation: during a training that was told to stop.
    """
    # Not the compiled model: a second graph would cost more time than it saves. A sharded one runs wrapped only.
    is_wrapped = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    evaluated: Any = model if model is not None else trainer.model_wrapped if is_wrapped else trainer.model
    was_training = evaluated.training
    evaluated.eval()
    results = []
    for batch in Bar(trainer.get_eval_dataloader(rows), title):
        if trainer.is_in_train and trainer.agree_to_stop():
            raise StoppedInEvaluation
        # This drops the rows that were repeated to fill the last batch of all processes.
        gathered = trainer.accelerator.gather_for_metrics(of_batch(evaluated, batch))
        results.append(tuple(tensor.cpu() for tensor in gathered))
    evaluated.train(was_training)
    return [torch.cat(parts) for parts in zip(*results, strict=True)]
