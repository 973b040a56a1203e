"""The rows of a task as the tokens that a model is given, made before it is loaded."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfkit.data.corpus import Row
from hfkit.data.tasks import Task
from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.evaluation.settings import Scoring
from hfkit.inference.generation import generation_of, prompts_of
from hfkit.inference.likelihood import encode_pair, pair_sums, token_sums
from hfkit.metrics.catalogue import made_of
from hfkit.model.loading import load_config, window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    def sums(self, model: "PreTrainedModel", batch_size: int, tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
        """Return the nats, tokens and bytes of each row: (rows, 3), float64. Call it on every process."""
        padding = tokenizer.pad_token_id
        if model.config.is_encoder_decoder:
            piece_sums = pair_sums(model, self.examples, batch_size, padding, tokenizer.bos_token_id)
        else:
            piece_sums = token_sums(model, self.examples, batch_size, padding)
        sums = np.zeros((len(self.sizes), 3))
        np.add.at(sums[:, :2], self.owners, piece_sums)
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
    tokenizer: "PreTrainedTokenizerBase"
    window: int
    generation: dict[str, Any]
    prompts: list[list[int]]
    cut: int
    pieces: Pieces | None


def inputs_of(scoring: Scoring, rows: list[Row], path: str) -> Inputs:
    """Return the rows for the model at `path`.

    Raises:
        HfkitError: if the window has no room for any of them.
    """
    task, metrics = scoring.task, scoring.metrics
    tokenizer = load_tokenizer(path, task.tokenizer_use, task.chat_template)
    config = load_config(path, scoring.trust_remote_code)
    window, is_whole = window_of(config, tokenizer), config.is_encoder_decoder
    generation: dict[str, Any] = {}
    prompts: list[tuple[list[int], bool]] = []
    if made_of("classes", metrics):
        prompts = [task.prompt_ids(row, tokenizer, window) for row in rows]
        prompts = [(ids or [tokenizer.pad_token_id], is_cut) for ids, is_cut in prompts]  # of a text that is blank
    elif made_of("texts", metrics):
        generation = generation_of(task, scoring.generation, tokenizer, window)
        prompts = prompts_of(task, rows, tokenizer, window, generation, is_whole)
    pieces = None
    if made_of("likelihood", metrics):
        pieces = _pieces(task, rows, tokenizer, window, is_whole)
        if not pieces.examples:
            raise HfkitError(f"{path}: no completion fits into the window of {window} tokens, so that none is likely")
    cut_count = sum(is_cut for _, is_cut in prompts)
    return Inputs(path, tokenizer, window, generation, [ids for ids, _ in prompts], cut_count, pieces)


def _pieces(
    task: Task, rows: list[Row], tokenizer: "PreTrainedTokenizerBase", window: int, is_encoder_decoder: bool
) -> Pieces:
    examples: list[Any] = []
    owners: list[int] = []
    sizes = np.zeros(len(rows))
    for index, row in enumerate(rows):
        encoded: list[Any]
        if is_encoder_decoder:
            encoded, text = [encode_pair(task, row, tokenizer, window)], task.references(row)[0]
        else:
            encoded = task.encode(row, tokenizer, window)
            text = task.learned_text(row, encoded, tokenizer)
        pieces = [piece for piece in encoded if piece is not None]
        examples += pieces
        owners += [index] * len(pieces)
        sizes[index] = len(text.encode()) if pieces else 0
    return Pieces(examples, owners, sizes)
