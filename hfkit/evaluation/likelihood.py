"""What a model expects: the likelihood of texts in sums over their tokens, and the class of a text."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn import functional

from hfkit.data.packing import IGNORED
from hfkit.data.tasks import Example
from hfkit.evaluation.batches import in_batches, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_sums(model: Any, examples: list[Example], batch_size: int, pad_token_id: int) -> np.ndarray:
    """Of each example the sum of the losses of its learned tokens in nats, and their number: (examples, 2), float64.

    The first token of an example is never predicted. Call it on every process.
    """

    def of_batch(chosen: list[int]) -> list[list[float]]:
        ids, mask = padded([examples[index].ids for index in chosen], pad_token_id)
        learned, _ = padded([list(map(int, examples[index].learned)) for index in chosen], 0)
        labels = ids.masked_fill(learned * mask == 0, IGNORED)[:, 1:].to(model.device)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        sums = []
        for row, row_labels in zip(logits[:, :-1], labels, strict=True):  # one row's logits in float32 at a time
            nats = functional.cross_entropy(row.float(), row_labels, ignore_index=IGNORED, reduction="sum")
            sums.append([nats.item(), float((row_labels != IGNORED).sum())])
        return sums

    rows = [example.ids for example in examples]
    return np.array(in_batches(model, rows, of_batch, batch_size, "likelihood"), dtype=np.float64)


def classes(model: Any, examples: list[Example], batch_size: int, pad_token_id: int) -> list[str]:
    """The name of the likeliest class of each example. Call it on every process."""

    def of_batch(chosen: list[int]) -> list[str]:
        ids, mask = padded([examples[index].ids for index in chosen], pad_token_id)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        return [model.config.id2label[index] for index in logits.argmax(-1).tolist()]

    return in_batches(model, [example.ids for example in examples], of_batch, batch_size, "classifying")


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


def encode_document(text: str, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
    """A document between the tokenizer's BOS and EOS, in windows."""
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(windows([*before, *ids, tokenizer.eos_token_id], length))
