"""Decoding with a batch that rows join and leave between steps.

`model.generate` computes every row of a batch until the longest one ends, pads all to one length, and copies the whole
cache at each step. Here a row that ends leaves its slot of the key/value cache to the next prompt (continuous
batching, Yu et al. 2022, "Orca"). A slot holds its row from the first column on, without padding: keys are written in
place, and attention sees no more columns than the longest row of the moment has. Long prompts are read in pieces, so
that the other rows get their tokens meanwhile (chunked prefill, Agrawal et al. 2023, "Sarathi").

Evaluation (`decode`) and the server step the same `Batch`.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfkit.errors import HfkitError
from hfkit.inference.slots import Prefixes, Slots
from hfkit.model.modeling_hfkit import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_AT_ONCE = 16_384  # tokens of prompts in one forward pass


class Rules(NamedTuple):
    """How the next token is chosen, and where a row ends. Of the two limits, `max_new_tokens` comes first."""

    warpers: list[Any] | None  # of the logits to sample from; None: the likeliest token is taken
    ends: list[int]
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int
    pad_token_id: int

    def room(self, prompt: list[int]) -> int:
        """The most tokens that may follow a prompt.

        Raises:
            HfkitError: if there is none.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        room = (self.max_length or 0) - len(prompt)
        if room < 1:
            raise HfkitError(
                f"generation.max_length={self.max_length}: must be more than the {len(prompt)} tokens of a prompt; "
                "raise it, or set max_new_tokens"
            )
        return room

    def choose(self, logits: torch.Tensor, ages: list[int]) -> list[int]:
        """The next token of each row.

        Args:
            logits: (rows, vocabulary), float32; they may be changed.
            ages: how many tokens each row has been given.
        """
        scores = logits
        young = [row for row, age in enumerate(ages) if age < self.min_new_tokens]
        if young and self.ends:
            scores[torch.tensor(young)[:, None], torch.tensor(self.ends)] = -torch.inf
        if self.warpers is None:
            return scores.argmax(-1).tolist()
        for warper in self.warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()


class Row:
    """A prompt in the batch, and the tokens that it was given.

    Args:
        room: the most tokens that it may be given.
        ends: the tokens that end it.
        index: which prompt it is, of those given to `decode`.

    Attributes:
        read: how many tokens of the prompt have keys.
    """

    def __init__(self, prompt: list[int], room: int, ends: Sequence[int], index: int = 0):
        self.prompt, self.room, self.ends, self.index = prompt, room, frozenset(ends), index
        self.tokens: list[int] = []
        self.read = 0

    @property
    def cached(self) -> int:
        """How many of its tokens have keys: of those that it was given, all but the last."""
        return self.read + max(len(self.tokens) - 1, 0)

    @property
    def is_done(self) -> bool:
        return bool(self.tokens) and (len(self.tokens) >= self.room or self.tokens[-1] in self.ends)


class Batch:
    """Rows that a model writes side by side.

    Args:
        model: a decoder that takes any cache, in evaluation mode. Call `step` without gradients.
        choose: from logits (rows, vocabulary), float32, and their rows to the next token of each.
        count: how many rows there may be at once.
        length: how many tokens a prompt and its answer may have together.
        together: how many rows wait for each other to be read at once, where there are so many.
        pad_token_id: what is read in place of nothing.
        prefixes: of how many rows that left the keys are kept.

    Attributes:
        piece: how many tokens of prompts are read between two steps of the rows that are written.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        choose: Callable[[torch.Tensor, list[Row]], list[int]],
        count: int,
        length: int,
        together: int = 1,
        pad_token_id: int = 0,
        prefixes: int = 0,
    ):
        self.model, self.choose, self.together, self.pad_token_id = model, choose, together, pad_token_id
        self.slots, self.prefixes, self.piece = Slots(count, length), Prefixes(prefixes), READ_AT_ONCE
        self.pending: deque[Row] = deque()
        self.rows: list[Row] = []  # by their slots
        self.reading: deque[Row] = deque()  # those of them whose prompts are not read to the end

    @property
    def is_busy(self) -> bool:
        return bool(self.rows or self.pending)

    def add(self, row: Row) -> None:
        """Let a row join as soon as there is a slot."""
        self.pending.append(row)

    def drop(self, row: Row) -> None:
        """Let a row leave at once, whatever it was given."""
        if row in self.pending:
            self.pending.remove(row)
        elif row in self.rows:
            self._leave(self.rows.index(row))

    def clear(self) -> list[Row]:
        """Let all rows leave, and the memory of their keys go. Return them."""
        rows = [*self.rows, *self.pending]
        for rest in (self.rows, self.pending, self.reading, self.prefixes.known, self.slots.states):
            rest.clear()
        return rows

    def step(self) -> list[Row]:
        """Give each row whose prompt is read a token, and read a piece of the other prompts.

        Returns:
            The rows with a new token. Those of them that are done have left.
        """
        written = [row for row in self.rows if row.tokens]
        self._admit()
        if written:
            self._write(written)
        if self.reading:
            written += self._read(self.piece if written else READ_AT_ONCE)
        for row in [row for row in written if row.is_done]:
            self._leave(self.rows.index(row))
        return written

    def _admit(self) -> None:
        free = self.slots.count - len(self.rows)
        if self.rows and free < min(self.together, len(self.pending)):
            return
        for _ in range(min(free, len(self.pending))):
            row = self.pending.popleft()
            row.read, copied = self.prefixes.longest(row.prompt)
            if copied:
                self.slots.put(len(self.rows), copied, row.read)
            self.rows.append(row)
            self.reading.append(row)

    def _leave(self, slot: int) -> None:
        row = self.rows[slot]
        if row in self.reading:
            self.reading.remove(row)
        else:
            self.prefixes.keep((*row.prompt, *row.tokens[:-1]), lambda: self.slots.copied(slot, row.cached))
        last = self.rows.pop()
        if last is not row:  # the last row moves to the slot, so that the rows stay side by side
            self.slots.move(len(self.rows), slot, last.cached)
            self.rows[slot] = last

    def _write(self, rows: list[Row]) -> None:
        """Give rows their next tokens. Rows between them that are not read yet are padding."""
        slots = [*range(self.rows.index(rows[-1]) + 1)]
        logits = self._logits(slots, [self.rows[slot].tokens[-1:] for slot in slots])
        is_written = [bool(self.rows[slot].tokens) for slot in slots]
        self._give(logits if all(is_written) else logits[is_written], rows)

    def _read(self, budget: int) -> list[Row]:
        """Read at most `budget` tokens of prompts, in turn. Return the rows that are read to the end."""
        rows: list[Row] = []
        tokens = 0  # of each
        for row in self.reading:
            longest = max(tokens, min(budget, len(row.prompt) - row.read))
            if rows and longest * (len(rows) + 1) > budget:
                break
            rows, tokens = [*rows, row], longest
        slots = [self.rows.index(row) for row in rows]
        pieces = [row.prompt[row.read : row.read + tokens] for row in rows]
        logits = self._logits(slots, pieces)
        for row, piece in zip(rows, pieces, strict=True):
            self.reading.popleft()
            row.read += len(piece)
            if row.read < len(row.prompt):
                self.reading.append(row)
        is_read = [row.read == len(row.prompt) for row in rows]
        done = list(itertools.compress(rows, is_read))
        if done:
            self._give(logits if all(is_read) else logits[is_read], done)
        return done

    def _give(self, logits: torch.Tensor, rows: list[Row]) -> None:
        for row, token in zip(rows, self.choose(logits.float(), rows), strict=True):
            row.tokens.append(token)

    def _logits(self, slots: list[int], pieces: list[list[int]]) -> torch.Tensor:
        """Read some tokens more of the rows of these slots.

        Returns:
            (rows, vocabulary), after the last token of each.
        """
        device, tokens = self.model.device, max(map(len, pieces))
        starts = [self.rows[slot].cached for slot in slots]
        gaps = [tokens - len(piece) for piece in pieces]  # padding on the left
        gap = [self.pad_token_id] * tokens
        ids = torch.tensor([gap[:size] + piece for size, piece in zip(gaps, pieces, strict=True)], device=device)
        ends = torch.tensor([start + len(piece) for start, piece in zip(starts, pieces, strict=True)], device=device)
        counted = torch.arange(-tokens, 0, device=device)  # from the end
        positions = ends[:, None] + counted  # (rows, tokens)
        is_padding = -counted > torch.tensor([len(piece) for piece in pieces], device=device)[:, None]
        columns, positions = positions.masked_fill(is_padding, self.slots.length), positions.masked_fill(is_padding, 0)
        width = max(start + len(piece) for start, piece in zip(starts, pieces, strict=True) if piece)
        self.slots.expect(slots, columns, width)
        mask = None  # whole prompts of one length need none
        if any(gaps) or any(starts):
            seen = torch.arange(width, device=device) <= positions[..., None]
            mask = seen[:, None]  # (rows, 1, tokens, width)
        if mask is not None and self.model.config._attn_implementation != "sdpa":
            mask = torch.where(mask, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)  # as eager adds it
        inputs: Any = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, CACHE: self.slots}
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


def decode(
    model: "PreTrainedModel", prompts: Sequence[list[int]], rules: Rules, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield the new tokens of each prompt with its index, in the order in which they end.

    Half a batch of prompts is read at once, so there are keys for up to 1.5 batches. Prompts are best sorted by
    length, the longest first. Sampling draws from torch's generator, step by step for all rows: with another batch
    size or number of processes the draws fall to other rows.

    Args:
        model: a decoder that takes any cache, in evaluation mode and without gradients.
        prompts: token ids; none may be empty.
    """
    rows = [Row(prompt, rules.room(prompt), rules.ends, index) for index, prompt in enumerate(prompts)]
    batch = Batch(
        model,
        lambda logits, rows: rules.choose(logits, [len(row.tokens) for row in rows]),
        count=min(batch_size + batch_size // 2, len(rows)),
        length=max((len(row.prompt) + row.room for row in rows), default=0),
        together=-(-batch_size // 2),
        pad_token_id=rules.pad_token_id,
    )
    batch.pending.extend(rows)
    while batch.is_busy:
        yield from ((row.index, row.tokens) for row in batch.step() if row.is_done)
