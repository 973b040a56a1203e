"""Decoding with a batch that stays full: where a row ends, the next prompt takes its place at once.

`model.generate` computes every row of a batch until the longest one ends, pads all to one length, and copies the whole
cache at each step. Here a row that ends leaves its slot of the key/value cache to a prompt that was read beforehand
(continuous batching, Yu et al. 2022, "Orca"), so that a step gives a token to as many rows as there are slots. A slot
holds its row from the first column on, without padding: a new key is written in place where the row ends, and
attention sees no more columns than the longest row of the moment has.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import Cache, DynamicCache

from hfkit.errors import HfkitError
from hfkit.inference.batches import padded
from hfkit.model.modeling_hfkit import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            logits: (rows, vocabulary)
            ages: how many tokens each row has been given.
        """
        scores = logits.float()
        young = [row for row, age in enumerate(ages) if age < self.min_new_tokens]
        if young and self.ends:
            scores[torch.tensor(young)[:, None], torch.tensor(self.ends)] = -torch.inf
        if self.warpers is None:
            return scores.argmax(-1).tolist()
        for warper in self.warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()


class Row:
    """A prompt in the loop, and the tokens that it was given."""

    def __init__(self, index: int, prompt: list[int], room: int):
        self.index, self.prompt, self.room = index, prompt, room
        self.tokens: list[int] = []

    @property
    def cached(self) -> int:
        """How many of its tokens have keys: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1

    def is_done(self, ends: list[int]) -> bool:
        return len(self.tokens) == self.room or self.tokens[-1] in ends


class Slots(Cache):
    """Keys and values of up to `count` rows, each from its slot's first column on; a slot is `length` columns long."""

    def __init__(self, count: int, length: int):
        super().__init__(layers=[])
        self.count, self.length = count, length
        self.states: list[list[torch.Tensor]] = []  # of each layer keys and values, (slots, heads, columns, head_dim)
        self.rows = self.places = torch.zeros(0, dtype=torch.long)  # the live slots, and where their next keys go
        self.width = 0  # of what attention sees

    def enter(self, slot: int, read: DynamicCache, place: int, tokens: int) -> None:
        """Take over the last `tokens` columns of a row that was read."""
        if not self.states:
            self.states = [
                [each.new_zeros(self.count, each.shape[1], self.length, each.shape[3]) for each in (keys, values)]
                for keys, values, *_ in read
            ]
        for (keys, values), layer in zip(self.states, read.layers, strict=True):
            keys[slot, :, :tokens] = layer.keys[place, :, -tokens:]
            values[slot, :, :tokens] = layer.values[place, :, -tokens:]

    def move(self, source: int, target: int, tokens: int) -> None:
        for keys, values in self.states:
            keys[target, :, :tokens] = keys[source, :, :tokens]
            values[target, :, :tokens] = values[source, :, :tokens]

    def expect(self, places: torch.Tensor, width: int) -> None:
        """What the next step writes: one token to each of the first rows, at these columns."""
        self.rows, self.places, self.width = torch.arange(len(places), device=places.device), places, width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values (rows, heads, 1, head_dim) of a step; return those of all tokens."""
        keys, values = self.states[layer_idx]
        # In the dtype of what was read: under autocast keys and values may differ, and DynamicCache makes one of them.
        keys[self.rows, :, self.places] = key_states[:, :, 0].to(keys.dtype)
        values[self.rows, :, self.places] = value_states[:, :, 0].to(values.dtype)
        return keys[: len(self.rows), :, : self.width], values[: len(self.rows), :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0


def decode(
    model: "PreTrainedModel", prompts: Sequence[list[int]], rules: Rules, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """The new tokens of each prompt with its index, in the order in which they end.

    Half a batch of prompts is read at once and waits for slots, so there are keys for up to 1.5 batches. Prompts are
    best sorted by length, the longest first. Sampling draws from torch's generator, step by step for all rows: with
    another batch size or number of processes the draws fall to other rows.

    Args:
        model: a decoder that takes any cache, in evaluation mode and without gradients.
        prompts: token ids; none may be empty.
    """
    pending = deque(Row(index, prompt, rules.room(prompt)) for index, prompt in enumerate(prompts))
    slots = Slots(min(batch_size, len(pending)), max((len(row.prompt) + row.room for row in pending), default=0))
    waiting: deque[tuple[Row, DynamicCache, int]] = deque()
    live: list[Row] = []
    while live or waiting or pending:
        while len(live) < batch_size and (waiting or pending):
            if not waiting:
                group = [pending.popleft() for _ in range(min(-(-batch_size // 2), len(pending)))]
                read = _read(model, group, rules)
                waiting.extend((row, read, place) for place, row in enumerate(group))
            row, read, place = waiting.popleft()
            if row.is_done(rules.ends):
                yield row.index, row.tokens
            else:
                slots.enter(len(live), read, place, row.cached)
                live.append(row)
        if live:
            _step(model, live, slots, rules)
        for slot in reversed(range(len(live))):
            row = live[slot]
            if row.is_done(rules.ends):
                yield row.index, row.tokens
                last = live.pop()
                if last is not row:  # the last row moves to the slot, so that the live ones stay together
                    slots.move(len(live), slot, last.cached)
                    live[slot] = last


def _read(model: "PreTrainedModel", rows: list[Row], rules: Rules) -> DynamicCache:
    """Read the prompts of rows, give each its first token, and return their keys and values, padded on the left."""
    ids, mask = (each.to(model.device) for each in padded([row.prompt for row in rows], rules.pad_token_id, "left"))
    read = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    _forward(model, rows, rules, input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: read})
    return read


def _step(model: "PreTrainedModel", rows: list[Row], slots: Slots, rules: Rules) -> None:
    """Give each row its next token."""
    device, width = model.device, max(row.cached for row in rows) + 1
    ids = torch.tensor([row.tokens[-1:] for row in rows], device=device)
    places = torch.tensor([[row.cached] for row in rows], device=device)
    mask = torch.arange(width, device=device) <= places  # (rows, width)
    if model.config._attn_implementation == "sdpa":
        mask = mask[:, None, None]  # as the model would make it, (rows, heads, query, width)
    slots.expect(places[:, 0], width)
    _forward(model, rows, rules, input_ids=ids, attention_mask=mask, position_ids=places, **{CACHE: slots})


def _forward(model: "PreTrainedModel", rows: list[Row], rules: Rules, **inputs: Any) -> None:
    logits = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]  # (rows, vocabulary)
    for row, token in zip(rows, rules.choose(logits, [len(row.tokens) for row in rows]), strict=True):
        row.tokens.append(token)
