"""Zeros for the weights of a whole model, chosen with the inputs that each matrix sees on some text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hfkit.compression.masks import Sparsity, magnitude, sparsegpt, wanda
from hfkit.data import corpus
from hfkit.data.tasks import Task
from hfkit.errors import HfkitError
from hfkit.model.heads import decoder_of
from hfkit.model.matrices import matrices_of, weight_of
from hfkit.model.slicing import layers_name
from hfkit.recipe.fields import Arguments
from hfkit.runtime.bars import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def texts_of(task: Task, path: str, split: str, rows: list[corpus.Row]) -> Iterator[str]:
    """Yield the texts to calibrate on, of a split of the data at `path`: documents, or prompts with their completions.

    Args:
        rows: those that the result is evaluated on.

    Raises:
        HfkitError: if a text is one of them, there are none, or the data set lacks a column of the task.
    """
    of_evaluation = {task.as_text(row) for row in rows}
    where, number = f"the {split} split of {path}", 0
    for number, row in enumerate(corpus.rows(path, split, list(task.columns())), 1):
        if (text := task.as_text(row)) in of_evaluation:
            raise HfkitError(f"calibration: text {number} of {where} is evaluated on; choose others")
        yield text
    if not number:
        raise HfkitError(f"calibration: {where} has no rows; choose another split")


def calibration_rows(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", length: int, count: int) -> Tensor:
    """Return the beginning of the texts as rows of tokens, int64 (rows, length); where they end early, fewer than
    `count`.

    The texts stand one behind the other, each between the tokenizer's BOS and EOS where it has them, and go on from
    row to row.

    Raises:
        HfkitError: if they do not fill a row.
    """
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    after = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = list[int]()
    for text in texts:
        ids += [*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *after]
        if len(ids) >= length * count:
            break
    rows = min(len(ids) // length, count)
    if rows == 0:
        raise HfkitError(
            f"calibration: the texts have {len(ids)} tokens, less than one row of {length}; "
            f"give more text, or shorter rows"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def prune_weights(
    model: "PreTrainedModel",
    rows: Tensor | None,
    method: Literal["magnitude", "wanda", "sparsegpt"],
    sparsity: Sparsity,
    batch_size: int = 8,
) -> None:
    """Set weights of every matrix in the decoder's layers to zero, in place.

    Embeddings and heads stay as they are. A layer sees what the layers before it, which are pruned, make of the rows;
    its own matrices see what the layer does before it is pruned.

    Args:
        rows: token ids (rows, length), without padding; magnitude needs none.

    Raises:
        HfkitError: if the layers have no such matrices, the pattern does not fit one, or its inputs are not finite.
    """
    layers = model.get_submodule(layers_name(model))
    if not any(matrices_of(layer) for layer in layers):
        what = f"a model of type {model.config.model_type} has no linear maps in its layers"
        raise HfkitError(f"method: {what}; drop layers instead")
    was_training = model.training
    model.eval()
    bar = Bar(layers, f"pruning by {method}", unit=" layers")
    if method == "magnitude":
        for layer in bar:
            for matrix in matrices_of(layer).values():
                weight = weight_of(matrix)
                weight.masked_fill_(~magnitude(weight, sparsity), 0)
    else:
        assert rows is not None, f"{method} looks at inputs"
        calls = LayerCalls(model, rows, batch_size)
        for layer in bar:
            matrices = matrices_of(layer)
            statistics = _input_statistics(matrices, method == "sparsegpt", calls.run)
            for name, matrix in matrices.items():
                weight = weight_of(matrix)
                if method == "sparsegpt":
                    weight.copy_(sparsegpt(weight, statistics[name], sparsity)[0])
                else:
                    weight.masked_fill_(~wanda(weight, statistics[name].sqrt(), sparsity), 0)
            calls.go_on()
    model.train(was_training)


def sparsity_of(model: "PreTrainedModel") -> dict[str, float]:
    """Return the share of weights that are exactly 0, by the name of each matrix in the decoder's layers."""
    prefix = layers_name(model)
    weights = {name: weight_of(matrix) for name, matrix in matrices_of(model.get_submodule(prefix)).items()}
    return {f"{prefix}.{name}": 1 - int(weight.count_nonzero()) / weight.numel() for name, weight in weights.items()}


class LayerCalls:
    """A decoder's layers on some rows, one after the other, as the decoder itself calls them.

    `states` are the inputs of the layer that is next, of each batch (rows, length, hidden).
    """

    def __init__(self, model: "PreTrainedModel", rows: Tensor, batch_size: int):
        self.layers = model.get_submodule(layers_name(model))
        batches = rows.to(model.device).split(batch_size)
        self.states = [_calls(model, self.layers[:1], batch)[0][0][0] for batch in batches]
        # What else a layer is called with, such as masks and positions, depends on the layer and on the batch's size.
        self.rest = {
            len(batch): [(args[1:], options) for args, options in _calls(model, self.layers, batch)]
            for batch in (batches[0], batches[-1])
        }
        self.next = 0

    def run(self) -> Iterator[Tensor]:
        """Yield the outputs of the next layer, a batch at a time."""
        for states in self.states:
            args, options = self.rest[len(states)][self.next]
            outputs = self.layers[self.next](states, *args, **options)
            yield outputs[0] if isinstance(outputs, tuple) else outputs

    def go_on(self) -> None:
        """Go on to the layer behind: what the next layer gives is its input."""
        for index, states in enumerate(self.run()):
            self.states[index] = states
        self.next += 1


class _Reached(Exception):
    """The decoder has called all the layers that were asked for."""


def _calls(model: "PreTrainedModel", layers: Sequence[nn.Module], ids: Tensor) -> list[tuple[tuple, Arguments]]:
    """Return what the decoder calls its first layers with, (arguments, options) of each. It goes no further."""
    calls = list[tuple[tuple, dict[str, Any]]]()

    def note(_: nn.Module, args: tuple, options: Arguments) -> None:
        calls.append((args, options))
        if len(calls) == len(layers):
            raise _Reached

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        decoder_of(model)(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _input_statistics(
    matrices: dict[str, nn.Module], is_gram: bool, run: Callable[[], Iterator[Tensor]]
) -> dict[str, Tensor]:
    """Return, of the inputs X (tokens, inputs) of each matrix while `run` runs: X^T X, or the sums of its squares
    (inputs,).

    In float32.

    Raises:
        HfkitError: if inputs are not finite.
    """
    statistics = dict[str, Tensor]()

    def add(name: str, _: nn.Module, args: tuple) -> None:
        inputs = args[0].flatten(0, -2).float()
        if is_gram:
            statistics[name].addmm_(inputs.T, inputs)
        else:
            statistics[name].add_(inputs.square().sum(0))

    hooks = []
    for name, matrix in matrices.items():
        weight = weight_of(matrix)  # (outputs, inputs)
        statistics[name] = torch.zeros(weight.shape[1:] * (2 if is_gram else 1), device=weight.device)
        hooks.append(matrix.register_forward_pre_hook(partial(add, name)))
    for _ in run():
        pass
    for hook in hooks:
        hook.remove()
    for name, statistic in statistics.items():
        if not statistic.isfinite().all():
            raise HfkitError(
                f"method: the inputs of {name} are not finite; use float32, or magnitude, which needs none"
            )
    return statistics
