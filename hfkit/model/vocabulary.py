"""A tokenizer beside its model: every id needs an embedding."""

from functools import lru_cache
from typing import TYPE_CHECKING

from hfkit.errors import HfkitError
from hfkit.runtime.distributed import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ids_of(tokenizer: "PreTrainedTokenizerBase", embeddings: int, path: str) -> int:
    """Return how many embeddings a model needs for a tokenizer: those that it has, or more where tokens were added.

    Args:
        embeddings: those that the model has.
        path: of the tokenizer.

    Raises:
        HfkitError: if ids of its own vocabulary, not of added tokens, have no embedding: it is another model's.
    """
    vocabulary = tokenizer.get_vocab()
    if (size := max(vocabulary.values(), default=-1) + 1) <= embeddings:
        return embeddings
    added = tokenizer.get_added_vocab()
    beyond = {i: token for token, i in vocabulary.items() if i >= embeddings and token not in added}
    if beyond:
        problem = f'its tokenizer has the id {min(beyond)} ("{beyond[min(beyond)]}")'
        remedy = "it is another model's: put back the tokenizer that the model was trained with"
        raise HfkitError(f"{path}: {problem}, and the model {embeddings:,} embeddings; {remedy}")
    return size


def grow(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", path: str) -> None:
    """Give each added token of a tokenizer an embedding, the mean of the others. Embeddings never become fewer.

    The mean is the same each time that a model is loaded, so that an adapter finds the base it was trained on.

    Raises:
        HfkitError: see `ids_of`.
    """
    import torch

    embeddings = len(model.get_input_embeddings().weight)
    size = ids_of(tokenizer, embeddings, path)
    if size == embeddings:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[embeddings:] = layer.weight[:embeddings].float().mean(0).to(layer.weight.dtype)
    _tell(path, size, embeddings)


@lru_cache
def _tell(path: str, size: int, embeddings: int) -> None:
    what = f"the model has {embeddings:,} embeddings and its tokenizer {size:,} ids"
    say(f"  {path}: {what}: {size - embeddings:,} added, each the mean of the others")
