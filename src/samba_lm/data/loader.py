"""Batches from a data set: a pure function of the seed and the step.

The stream of tokens is cut into disjoint windows of ``length`` tokens (and one more, shared with the next window, as
the last target). Each epoch reads every window once, in an order of its own drawn from the seed. Nothing is kept but
the integer step, so a run resumes exactly by counting steps, on any number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all int64 ``[B, L]``.

    Attributes:
        input_ids: the tokens read.
        targets: the token after each; with documents, ``IGNORE_INDEX`` where that belongs to the next document.
        segments: the number of the document each token is in, counted within the row from 0; None without documents.
        stretch: how many times as long the texts are that the rows stand for (``samba_lm.train.stretched``).
        before: of parts of rows (``samba_lm.data.columns``), which document precedes the first column and how many of
            its tokens do, int64 [B] both; None: rows begin here.
    """

    input_ids: Tensor
    targets: Tensor
    segments: Tensor | None
    stretch: float = 1.0
    before: tuple[Tensor, Tensor] | None = None


class Batches(Protocol):
    """Training batches, wherever they come from: batch n of a run is always the same one."""

    batch_size: int
    """Rows of ``length`` tokens in a global batch, over all ranks; a batch of shorter rows has as many tokens."""
    length: int
    """Tokens of the longest rows."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of ``rank`` in the global batch of ``step``, from 0."""

    def fingerprint(self) -> str:
        """sha256 of the data."""


class Loader:
    """Training batches of prepared data.

    Args:
        dataset: where the tokens come from.
        batch_size: rows in a global batch, over all ranks.
        length: tokens in a row.
        seed: of the order of the windows.
        documents: whether to tell documents apart (``segments``, ignored targets) or read one endless stream.

    Raises:
        UserError: the data set is shorter than one window, or a size is not positive.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, length: int, seed: int, documents: bool = False) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}: it must be from 0 to {2**32 - 1}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.documents = documents
        self.windows = num_windows(dataset, length)

    def fingerprint(self) -> str:
        """sha256 of the data's description, which holds the sha256 of every shard."""
        return hashlib.sha256(self.dataset.meta.model_dump_json().encode()).hexdigest()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the rows of ``rank`` in the global batch of ``step`` (from 0), ``B = batch_size / world``.

        The global batch does not depend on ``world``; rank r has the r-th contiguous part of it. An epoch may end, and
        the next begin, within a batch.

        Raises:
            UserError: ``batch_size`` is not a multiple of ``world``.
        """
        if self.batch_size % world:
            raise UserError(
                f"batch_size {self.batch_size} does not divide among {world} processes: use a multiple of {world}."
            )
        assert step >= 0
        assert 0 <= rank < world
        rows = self.batch_size // world
        first = step * self.batch_size + rank * rows
        return read_windows(self.dataset, self._order(first, rows), self.length, self.documents)

    def _order(self, first: int, rows: int) -> list[int]:
        epochs = (divmod(row, self.windows) for row in range(first, first + rows))
        return [int(_permutation(self.windows, self.seed, epoch)[at]) for epoch, at in epochs]


def num_windows(dataset: TokenDataset, length: int) -> int:
    """Return how many disjoint windows of ``length`` tokens, each followed by a last target, the data set holds.

    Raises:
        UserError: not even one, or ``length`` is not positive.
    """
    if length < 1:
        raise UserError(f"The sequence length is {length}: it must be at least 1.")
    windows = (dataset.num_tokens - 1) // length
    if windows < 1:
        raise UserError(
            f"{dataset.folder} has {dataset.num_tokens} tokens, fewer than one row of length {length} needs "
            f"({length + 1}): give more text or a shorter length."
        )
    return windows


def read_windows(dataset: TokenDataset, windows: Sequence[int], length: int, documents: bool = False) -> Batch:
    """Return the windows numbered ``windows`` (window i starts at token ``i * length``) as a batch, in that order.

    For evaluation read them in sequence: ``range(num_windows(dataset, length))`` covers the data set once.
    """
    # One more token than is read: the last one's target.
    tokens = np.stack([dataset.tokens(i * length, (i + 1) * length + 1) for i in windows])
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    segments = None
    if documents:
        last = np.zeros(inputs.shape, dtype=np.int64)
        for row, i in zip(last, windows, strict=True):
            row[dataset.document_ends(i * length, (i + 1) * length) - i * length] = 1
        # What follows a document says nothing of it: that target would teach noise.
        targets[last == 1] = IGNORE_INDEX
        segments = torch.from_numpy(np.cumsum(last, axis=1) - last)
    return Batch(torch.from_numpy(inputs.copy()), torch.from_numpy(targets), segments)


@functools.lru_cache(maxsize=4)
def _permutation(windows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # RandomState is the one numpy generator whose stream is promised never to change between versions.
    order: NDArray[np.int64] = np.random.RandomState([seed, epoch]).permutation(windows)
    return order
