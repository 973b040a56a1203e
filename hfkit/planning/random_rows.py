"""Rows of random tokens that stand for those of a data set which is not there yet."""

import functools
from typing import Any

import torch
from transformers import default_data_collator

from hfkit.data.rows.examples import pad
from hfkit.data.rows.packing import IGNORED
from hfkit.planning.work import Lengths


class RandomRows(torch.utils.data.Dataset):
    """Rows of random tokens, as long as those that they stand for."""

    def __init__(self, lengths: Lengths, count: int, vocabulary: int, classes: int):
        self.lengths, self.count, self.vocabulary, self.classes = lengths, count, vocabulary, classes
        self.bytes, self.labels, self.sequence_length = 1, None, lengths.padded_to
        is_packed = lengths.padded_to is not None
        self.collate: Any = default_data_collator if is_packed else functools.partial(pad, pad_token_id=0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        of_row = self.lengths.tokens[index * 7919 % len(self.lengths.tokens)]  # a prime: neighbours are not alike
        length = self.lengths.padded_to or of_row
        ids = torch.randint(self.vocabulary, (length,))
        if self.classes:
            return {"input_ids": ids, "labels": torch.tensor(index % self.classes)}
        learned = min(max(round(self.lengths.learned * of_row / self.lengths.mean), 1), length - 1)
        labels = torch.full_like(ids, IGNORED)
        labels[torch.arange(1, length)[:: max((length - 1) // learned, 1)][:learned]] = 1
        labels = torch.where(labels == 1, ids, labels)
        row = {"input_ids": ids, "labels": labels}
        is_masked = self.lengths.padded_to is not None and self.lengths.is_masked
        return {**row, "position_ids": torch.arange(length) % max(length // 2, 1)} if is_masked else row
