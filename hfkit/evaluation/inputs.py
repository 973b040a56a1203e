"""The rows of a task as the tokens that a model is given, made before it is loaded."""

from typing import Any, NamedTuple

import numpy as np

from hfkit.data.tasks import encode, prompt_ids, reference
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.inference.generation import generation_of, prompts_of
from hfkit.inference.likelihood import encode_document, encode_pair, pair_sums, token_sums
from hfkit.metrics.catalogue import made_of
from hfkit.model.loading import load_config, window_of


class Pieces(NamedTuple):
    """What a likelihood is taken of.

    Args:
        examples: `Example`s, or for encoder-decoders `Pair`s.
        owners: of each the row that it is of.
        sizes: of each row the bytes of its text, (rows,); 0 where it has no room.
    """

    examples: list[Any]
    owners: list[int]
    sizes: np.ndarray

    def sums(self, model: Any, batch_size: int, tokenizer: Any) -> np.ndarray:
        """Of each row nats, tokens and bytes: (rows, 3), float64. Call it on every process."""
        padding = tokenizer.pad_token_id
        if model.config.is_encoder_decoder:
            found = pair_sums(model, self.examples, batch_size, padding, tokenizer.bos_token_id)
        else:
            found = token_sums(model, self.examples, batch_size, padding)
        sums = np.zeros((len(self.sizes), 3))
        np.add.at(sums[:, :2], self.owners, found)
        sums[:, 2] = self.sizes
        return sums


class Inputs(NamedTuple):
    """What a model is given.

    Args:
        place: of the model.
        window: the most tokens that it takes.
        generation: arguments of `GenerationConfig`.
        prompts: of each row; empty where there is no room. None at all where no answers are asked for.
        cut: how many rows have lost some of their prompt, or all of it.
        pieces: see there; None where no likelihood is asked for.
    """

    place: str
    tokenizer: Any
    window: int
    generation: dict[str, Any]
    prompts: list[list[int]]
    cut: int
    pieces: Pieces | None


def inputs_of(recipe: Any, rows: list[dict[str, Any]], place: str) -> Inputs:
    """The rows for the model at `place`, as the recipe of an evaluation asks for them.

    Raises:
        HfkitError: if the window has no room for any of them.
    """
    tokenizer: Any = load_tokenizer(
        place, "classify" if recipe.task == "classify" else "generate", recipe.chat_template
    )
    config = load_config(place, recipe.trust_remote_code)
    window, is_whole = window_of(config, tokenizer), config.is_encoder_decoder
    generation: dict[str, Any] = {}
    prompts: list[tuple[list[int], bool]] = []
    if made_of("classes", recipe.chosen):
        prompts = [prompt_ids(recipe, row, tokenizer, window) for row in rows]
        prompts = [(ids or [tokenizer.pad_token_id], is_cut) for ids, is_cut in prompts]  # of a text that is blank
    elif made_of("texts", recipe.chosen):
        generation = generation_of(recipe, tokenizer, window)
        prompts = prompts_of(recipe, rows, tokenizer, window, generation, is_whole)
    pieces = None
    if made_of("likelihood", recipe.chosen):
        pieces = _pieces(recipe, rows, tokenizer, window, is_whole)
        if not pieces.examples:
            raise HfkitError(f"{place}: no completion fits into the window of {window} tokens, so that none is likely")
    cut = sum(is_cut for _, is_cut in prompts)
    return Inputs(place, tokenizer, window, generation, [ids for ids, _ in prompts], cut, pieces)


def _pieces(recipe: Any, rows: list[dict[str, Any]], tokenizer: Any, window: int, is_encoder_decoder: bool) -> Pieces:
    examples: list[Any] = []
    owners: list[int] = []
    sizes = np.zeros(len(rows))
    for index, row in enumerate(rows):
        found: list[Any]
        if recipe.task == "text":
            found, text = encode_document(row["text"], tokenizer, window), row["text"]
        elif is_encoder_decoder:
            found, text = [encode_pair(recipe, row, tokenizer, window)], reference(recipe, row)[0]
        else:
            found = encode(recipe, row, tokenizer, window)
            text = "".join(tokenizer.decode(each.learned_ids, skip_special_tokens=True) for each in found)
        kept = [each for each in found if each is not None]
        examples += kept
        owners += [index] * len(kept)
        sizes[index] = len(text.encode()) if kept else 0
    return Pieces(examples, owners, sizes)
