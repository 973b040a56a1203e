"""Where the rows of a batch have their keys and values: slots, and what is kept of rows that left."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache

LEAST_PREFIX = 16  # tokens; to read fewer again costs less than to look for them


class Slots(Cache):
    """Keys and values of up to `count` rows, each from its slot's first column on; a slot is `length` columns long.

    One more column takes what is written for padding, and is never read.
    """

    def __init__(self, count: int, length: int):
        super().__init__(layers=[])
        self.count, self.length = count, length
        self.states: list[list[torch.Tensor]] = []  # of each layer keys and values, (slots, heads, columns, head_dim)
        self.slots: slice | torch.Tensor = slice(0)  # of the next forward pass
        self.rows = self.columns = torch.zeros(0, 1, dtype=torch.long)  # the same, and where its keys go
        self.width = 0  # of what attention sees

    def expect(self, slots: list[int], columns: torch.Tensor, width: int) -> None:
        """Set what the next forward pass writes: to these slots, at these columns (rows, tokens)."""
        indices = torch.tensor(slots, device=columns.device)
        is_range = slots == [*range(slots[0], slots[0] + len(slots))]
        self.slots = slice(slots[0], slots[-1] + 1) if is_range else indices  # a slice copies nothing
        self.rows, self.columns, self.width = indices[:, None], columns, width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values (rows, heads, tokens, head_dim) of a step; return those of all tokens."""
        new = (key_states, value_states)
        if len(self.states) == layer_idx:  # all in the dtype of keys: under autocast that of values may be another
            shapes = [(self.count, state.shape[1], self.length + 1, state.shape[3]) for state in new]
            self.states.append([key_states.new_zeros(shape) for shape in shapes])
        for state, values in zip(self.states[layer_idx], new, strict=True):
            state[self.rows, :, self.columns] = values.transpose(1, 2).to(state.dtype)
        keys, values = (state[self.slots, :, : self.width] for state in self.states[layer_idx])
        return keys, values

    def move(self, source: int, target: int, columns: int) -> None:
        for state in itertools.chain(*self.states):
            state[target, :, :columns] = state[source, :, :columns]

    def copied(self, slot: int, columns: int) -> list[torch.Tensor]:
        """Return the first columns of a slot: of each layer keys and values, (heads, columns, head_dim)."""
        return [state[slot, :, :columns].clone() for state in itertools.chain(*self.states)]

    def put(self, slot: int, copied: list[torch.Tensor], columns: int) -> None:
        """Write the first columns of what `copied` returned."""
        for state, source in zip(itertools.chain(*self.states), copied, strict=True):
            state[slot, :, :columns] = source[:, :columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width - self.columns.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0


class Prefixes:
    """Keys and values of the last rows that left, for prompts that begin like them.

    Args:
        room: of how many rows.
    """

    def __init__(self, room: int):
        self.room = room
        self.known: OrderedDict[tuple[int, ...], list[torch.Tensor]] = OrderedDict()  # the last used at the end

    def keep(self, tokens: tuple[int, ...], copied: Callable[[], list[torch.Tensor]]) -> None:
        if not self.room or len(tokens) < LEAST_PREFIX:
            return
        for other in [other for other in self.known if tokens[: len(other)] == other]:
            del self.known[other]
        self.known[tokens] = copied()
        if len(self.known) > self.room:
            self.known.popitem(last=False)

    def longest(self, prompt: list[int]) -> tuple[int, list[torch.Tensor]]:
        """Return how many tokens of a prompt are known, all but the last at most, and what holds them."""
        length, best = max(((_common(known, prompt), known) for known in self.known), default=(0, ()))
        length = min(length, len(prompt) - 1)
        if length < LEAST_PREFIX:
            return 0, []
        self.known.move_to_end(best)
        return length, self.known[best]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return with how many equal tokens two sequences begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
