"""What a model expects: the likelihood of texts in sums over their tokens, and the class of a text."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from hfkit.data.corpus import Row
from hfkit.data.rows.packing import IGNORED
from hfkit.data.tasks import Example, Task
from hfkit.inference.batches import in_batches, padded
from hfkit.inference.classes import chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pair(NamedTuple):
    """What an encoder reads, and what its decoder is to write, as token ids."""

    source: list[int]
    target: list[int]


def token_sums(model: "PreTrainedModel", examples: list[Example], batch_size: int, pad_token_id: int) -> np.ndarray:
    """Of each example the sum of the losses of its learned tokens in nats, and their number: (examples, 2), float64.

    The first token of an example is never predicted. Call it on every process.
    """

    def of_batch(chosen: list[int]) -> list[list[float]]:
        ids, mask = padded([examples[index].ids for index in chosen], pad_token_id)
        learned, _ = padded([list(map(int, examples[index].learned)) for index in chosen], 0)
        labels = ids.masked_fill(learned * mask == 0, IGNORED)[:, 1:].to(model.device)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        return _sums(logits[:, :-1], labels)

    rows = [example.ids for example in examples]
    return np.array(in_batches(model, rows, of_batch, batch_size, "likelihood"), dtype=np.float64)


def pair_sums(
    model: "PreTrainedModel", pairs: list[Pair], batch_size: int, pad_token_id: int, bos_token_id: int | None
) -> np.ndarray:
    """`token_sums` of the targets of an encoder-decoder. A BOS that a target begins with is read, but not counted."""

    def of_batch(chosen: list[int]) -> list[list[float]]:
        ids, mask = padded([pairs[index].source for index in chosen], pad_token_id)
        targets, _ = padded([pairs[index].target for index in chosen], IGNORED)
        targets = targets.to(model.device)
        # Given labels, the model shifts them to the right and begins as it was trained to.
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), labels=targets).logits
        labels = targets.clone()
        labels[:, 0][labels[:, 0] == bos_token_id] = IGNORED
        return _sums(logits, labels)

    rows = [pair.source + pair.target for pair in pairs]
    return np.array(in_batches(model, rows, of_batch, batch_size, "likelihood"), dtype=np.float64)


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    """Nats and tokens of each row of (batch, tokens, vocabulary), only one row's logits in float32 at a time."""
    sums = []
    for row, row_labels in zip(logits, labels, strict=True):
        nats = functional.cross_entropy(row.float(), row_labels, ignore_index=IGNORED, reduction="sum")
        sums.append([nats.item(), float((row_labels != IGNORED).sum())])
    return sums


def classes(model: "PreTrainedModel", texts: list[list[int]], batch_size: int, pad_token_id: int) -> list[Any]:
    """The class of each text, given as token ids, or the list of its classes. Call it on every process.

    A decoder takes the last token that is not padding, as its own configuration knows it: that is made to agree.
    """
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad_token_id

    def of_batch(rows: list[int]) -> list[Any]:
        ids, mask = padded([texts[index] for index in rows], pad_token_id)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        return chosen(logits, model.config)

    return in_batches(model, texts, of_batch, batch_size, "classifying")


def encode_pair(task: Task, row: Row, tokenizer: "PreTrainedTokenizerBase", length: int) -> Pair | None:
    """The prompt and the first completion of a row, each at most `length`; None if one does not fit."""
    source, _ = task.prompt_ids(row, tokenizer, length, is_whole=True)
    target = tokenizer(text_target=task.references(row)[0])["input_ids"]
    return Pair(source, target) if source and 0 < len(target) <= length else None
