"""The held-out batches of a run: the same ones, in the same order, at every validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from samba_lm.data.loader import Batch, num_windows, read_windows
from samba_lm.data.shards import TokenDataset
from samba_lm.loss import IGNORE_INDEX


class ValidationWindows:
    """The first ``sequences`` windows of a data set (all of them when there are fewer), ``rows`` a batch.

    Iterable any number of times; batches are read as they are asked for. Raises UserError when the data set is shorter
    than one window.

    Of several processes each has its share, and all make the same number of batches of the same sizes, because models
    that are sharded among processes must be called equally often by all: where the windows do not divide, some
    process's last row has no targets that count.

    Args:
        dataset: the held-out text.
        sequences: windows of all processes together.
        rows: windows of one process's batch; the last batch may have fewer.
        length: tokens of a window.
        documents: whether to tell documents apart.
        rank: which process this is.
        world: how many there are.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequences: int,
        rows: int,
        length: int,
        documents: bool = False,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        self.dataset = dataset
        self.rows = rows
        self.length = length
        self.documents = documents
        self.sequences = min(sequences, num_windows(dataset, length))
        self._rank, self._world = rank, world

    def bytes_read(self) -> int:
        """Size of the shards that are read, whole."""
        shards = self.dataset.shards_of(0, self.sequences * self.length + 1)
        return sum(file.size for file in self.dataset.shard_files(shards, self.documents))

    def __iter__(self) -> Iterator[Batch]:
        share = -(-self.sequences // self._world)
        for first in range(0, share, self.rows):
            # Dealt out one by one, so that no two processes differ by more than a row.
            windows = [i * self._world + self._rank for i in range(first, min(first + self.rows, share))]
            read = [min(window, self.sequences - 1) for window in windows]
            batch = read_windows(self.dataset, read, self.length, self.documents)
            missing = torch.tensor([window >= self.sequences for window in windows])
            yield replace(batch, targets=batch.targets.masked_fill(missing[:, None], IGNORE_INDEX))
