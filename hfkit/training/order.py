"""The order of the training rows: the same for any number of processes, and known from the epoch alone."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """The rows of an epoch, shuffled by seed and epoch, filled up from its beginning to whole steps.

    Because every step has `rows_a_step` rows, batches dealt to the processes in turn give each step the same rows
    however many processes there are.

    Args:
        rows: in the data set.
        rows_a_step: of all processes together.
        seed: of the shuffle; None keeps the order of the data set.
    """

    def __init__(self, rows: int, rows_a_step: int, seed: int | None):
        self.rows, self.rows_a_step, self.seed = rows, rows_a_step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.rows_a_step) * self.rows_a_step

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.rows)
        if self.seed is not None:
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + self.epoch)).numpy()
        for index in range(len(self)):
            yield int(order[index % self.rows])
