"""What a model costs: disk, memory, time to load, and how fast it writes. Each is measured in a process of its own."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from hfkit.artifacts import manifest
from hfkit.artifacts.manifest import ADAPTER, is_adapter
from hfkit.data.chat import generation_ids
from hfkit.inference.generation import generating_with
from hfkit.model.loading import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PROMPT_TOKENS, NEW_TOKENS = 32, 64
REPETITIONS = 3
NOT_OF_THE_MODEL = {*manifest.DIGEST_EXCLUDES, "predictions.jsonl"}


def size_on_disk(path_or_id: str) -> int | None:
    """Return the bytes of the files that a model is loaded from, its tokenizer's among them; with an adapter also its
    base's.

    None for an id on the Hub that is not in the cache.
    """
    folder: Path | None = Path(path_or_id)
    if not Path(path_or_id).is_dir():
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(path_or_id, "config.json") or try_to_load_from_cache(path_or_id, ADAPTER)
        folder = Path(file).parent if isinstance(file, str) else None
    if folder is None:
        return None
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in NOT_OF_THE_MODEL]
    size = sum(path.stat().st_size for path in files)
    return size + (size_on_disk(base_of(path_or_id)) or 0 if is_adapter(path_or_id) else 0)


class Memory:
    """The most memory that was taken since a moment: of the device, or on a CPU of the process.

    On a CPU the process must have begun for this alone: the system knows only the most that it ever took.
    """

    def __init__(self) -> None:
        import psutil

        gc.collect()
        self.before = psutil.Process().memory_info().rss
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        try:
            import resource
        except ImportError:  # Windows, where psutil knows the peak
            import psutil

            return max(psutil.Process().memory_info().peak_wset - self.before, 0)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return max(most - self.before, 0)


def speeds(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: list[int], window: int
) -> dict[str, float]:
    """Return `first_token_seconds`, `tokens_per_second` and `tokens_per_second_batch_8` of greedy writing, each the
    median of several after one that does not count.

    Args:
        ids: a text, whose beginning is gone on with.
        window: the most tokens that the model takes.
    """
    new_tokens = min(NEW_TOKENS, window // 2)
    prompt = ids[: min(PROMPT_TOKENS, window - new_tokens)]
    metrics = {"first_token_seconds": _median(lambda: _write(model, tokenizer, prompt, 1, 1))}
    for rows, name in ((1, "tokens_per_second"), (8, "tokens_per_second_batch_8")):
        seconds = _median(lambda rows=rows: _write(model, tokenizer, prompt, rows, new_tokens))  # type: ignore[misc]
        metrics[name] = rows * new_tokens / seconds
    return metrics


@torch.no_grad()
def reading_speeds(model: "PreTrainedModel", ids: list[int]) -> dict[str, float]:
    """Return the speeds of a classifier, which only reads: `first_token_seconds` is until the class of one text is
    known."""
    metrics = {}
    for rows, name in ((8, "tokens_per_second_batch_8"), (1, "tokens_per_second")):
        batch = torch.tensor([ids] * rows, device=model.device)
        seconds = _median(lambda batch=batch: model(input_ids=batch).logits.float().cpu())  # type: ignore[misc]
        metrics[name] = batch.numel() / seconds
    return {"first_token_seconds": seconds, **metrics}


def _write(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: list[int], rows: int, new_tokens: int
) -> None:
    ids = torch.tensor([prompt] * rows, device=model.device)
    ends = generation_ids(tokenizer, is_chat=False)
    config = GenerationConfig(min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, **ends)
    with generating_with(model, config):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids)).cpu()


def _median(work: Callable[[], Any]) -> float:
    """Return the median in seconds."""
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
