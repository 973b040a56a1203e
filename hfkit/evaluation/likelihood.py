"""What a model expects: the likelihood of texts in sums over their tokens, and the class of a text."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from hfkit.data.packing import IGNORED
from hfkit.data.tasks import Example
from hfkit.ranks import is_main, of_all, rank, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def token_sums(model: Any, examples: list[Example], batch_size: int, pad_token_id: int) -> np.ndarray:
    """Of each example the sum of the losses of its learned tokens in nats, and their number: (examples, 2), float64.

    The first token of an example is never predicted. Call it on every process.
    """

    def of_batch(chosen: list[Example]) -> list[list[float]]:
        ids, mask = _right_padded([each.ids for each in chosen], pad_token_id)
        learned, _ = _right_padded([list(map(int, each.learned)) for each in chosen], 0)
        labels = ids.masked_fill(learned * mask == 0, IGNORED)[:, 1:].to(model.device)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        sums = []
        for row, row_labels in zip(logits[:, :-1], labels, strict=True):  # one row's logits in float32 at a time
            nats = functional.cross_entropy(row.float(), row_labels, ignore_index=IGNORED, reduction="sum")
            sums.append([nats.item(), float((row_labels != IGNORED).sum())])
        return sums

    return np.array(_in_batches(model, examples, of_batch, batch_size, "likelihood"), dtype=np.float64)


@torch.no_grad()
def classes(model: Any, examples: list[Example], batch_size: int, pad_token_id: int) -> list[str]:
    """The name of the likeliest class of each example. Call it on every process."""

    def of_batch(chosen: list[Example]) -> list[str]:
        ids, mask = _right_padded([each.ids for each in chosen], pad_token_id)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        return [model.config.id2label[index] for index in logits.argmax(-1).tolist()]

    return _in_batches(model, examples, of_batch, batch_size, "classifying")


def windows(ids: list[int], length: int) -> Iterator[Example]:
    """A long text as examples of at most `length` tokens. The last token of one is the context that begins the next,
    so that every token after the first is predicted exactly once."""
    for start in range(0, max(len(ids) - 1, 1), length - 1):
        piece = ids[start : start + length]
        yield Example(piece, [True] * len(piece))


def perplexity(sums: np.ndarray) -> dict[str, float]:
    """`perplexity` and `bits_per_byte` of the sums of (nats, tokens, bytes)."""
    nats, tokens, size = sums
    return {
        "perplexity": math.exp(min(nats / max(tokens, 1), 700)),
        "bits_per_byte": nats / math.log(2) / max(size, 1),
    }


def _in_batches(
    model: Any, examples: list[Example], of_batch: Callable[[list[Example]], list[Any]], batch_size: int, title: str
) -> list[Any]:
    """One result for each example: those of like length together, dealt to the processes in turn."""
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].ids), index))[rank() :: world_size()]
    was_training = model.training
    model.eval()
    found: list[tuple[int, Any]] = []
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=title, leave=False, mininterval=1, disable=not is_main()):
        chosen = order[start : start + batch_size]
        found += zip(chosen, of_batch([examples[index] for index in chosen]), strict=True)
    model.train(was_training)
    results = dict(pair for share in of_all(title, found) for pair in share)
    return [results[index] for index in range(len(examples))]


def _right_padded(rows: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one tensor, and its mask, each (batch, longest)."""
    length = max(map(len, rows))
    padded = torch.full((len(rows), length), value)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return padded, mask


def encode_document(text: str, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
    """A document between the tokenizer's BOS and EOS, in windows."""
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(windows([*before, *ids, tokenizer.eos_token_id], length))
