"""The held-out batches of a run: the same ones, in the same order, at every validation."""

from __future__ import annotations

from collections.abc import Iterator

from samba_lm.data.loader import Batch, num_windows, read_windows
from samba_lm.data.shards import TokenDataset


class ValidationWindows:
    """The first ``sequences`` windows of a data set (all of them when there are fewer), ``rows`` a batch.

    Iterable any number of times; batches are read as they are asked for. Raises UserError when the data set is shorter
    than one window.
    """

    def __init__(self, dataset: TokenDataset, sequences: int, rows: int, length: int, documents: bool = False) -> None:
        self.dataset = dataset
        self.rows = rows
        self.length = length
        self.documents = documents
        self.sequences = min(sequences, num_windows(dataset, length))

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.sequences, self.rows):
            windows = range(first, min(first + self.rows, self.sequences))
            yield read_windows(self.dataset, windows, self.length, self.documents)
