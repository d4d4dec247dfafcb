"""Batches from a data set: a pure function of the seed and the step.

The stream of tokens is cut into disjoint windows of ``length`` tokens (and one more, shared with the next window, as
the last target). Each epoch reads every window once, in an order of its own drawn from the seed
(:mod:`samba_lm.data.order`). Nothing is kept but the integer step, so a run resumes exactly by counting steps, on any
number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from samba_lm.data.order import LARGEST_TABLE, Order, Shuffle, Shuffled, ShuffledInGroups
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
        stretch: for how many of its kind each token stands (``samba_lm.train.stretched``), fp32 ``[B, L]``; None: one.
        apart: of the parts of a row that attention sees each by itself, the number, none less than the one to its left;
            None: it sees all of a document that its windows reach.
        before: of parts of rows (``samba_lm.data.columns``), which document precedes the first column and how many of
            its tokens do, int64 [B] both; None: rows begin here.
    """

    input_ids: Tensor
    targets: Tensor
    segments: Tensor | None
    stretch: Tensor | None = None
    apart: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None

    def tokenwise(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``change`` made to each tensor that has a number for every token."""
        ids, targets = change(self.input_ids), change(self.targets)
        segments, stretch, apart = (None if t is None else change(t) for t in (self.segments, self.stretch, self.apart))
        return replace(self, input_ids=ids, targets=targets, segments=segments, stretch=stretch, apart=apart)


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
        group: read the shards in groups of so many, each shuffled by itself; None: all rows in one order.
        table: up to so many rows an epoch's order is kept as a table (:class:`samba_lm.data.order.Shuffle`).

    Raises:
        UserError: the data set is shorter than one window, or a size is not positive.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        length: int,
        seed: int,
        documents: bool = False,
        *,
        group: int | None = None,
        table: int = LARGEST_TABLE,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}: it must be from 0 to {2**32 - 1}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.length = length
        self.documents = documents
        self.group = group
        windows, shuffle = num_windows(dataset, length), Shuffle(seed, table)
        sizes = [shard.tokens for shard in dataset.meta.shards]
        self.order: Order
        if group is None:
            self.order = Shuffled(windows, length, shuffle, len(sizes))
        else:
            self.order = ShuffledInGroups(sizes, length, shuffle, group, str(dataset.folder))

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return self.order.rows

    def bytes_at_once(self) -> int:
        """Upper bound of the shards' bytes that must be at hand, those that come next included."""
        sizes = sorted(
            (shard.tokens_bytes + shard.offsets_bytes * self.documents for shard in self.dataset.meta.shards),
            reverse=True,
        )
        return sum(sizes if self.group is None else sizes[: 2 * self.group])

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
        return self.read(local_rows(self.batch_size, step, rank, world))

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """The rows of these numbers, counted through all epochs, in this order."""
        self.dataset.expect(*self.order.shards(int(rows[0])), documents=self.documents)
        return read_rows(self.dataset, self.order.starts(rows).tolist(), self.length, self.documents)


def local_rows(batch_size: int, step: int, rank: int, world: int) -> NDArray[np.int64]:
    """The numbers of the rows of ``rank`` in the global batch of ``step``, int64, rising.

    Raises:
        UserError: ``batch_size`` is not a multiple of ``world``.
    """
    if batch_size % world:
        raise UserError(f"batch_size {batch_size} does not divide among {world} processes: use a multiple of {world}.")
    assert step >= 0
    assert 0 <= rank < world
    rows = batch_size // world
    first = step * batch_size + rank * rows
    return np.arange(first, first + rows)


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
    return read_rows(dataset, [i * length for i in windows], length, documents)


def read_rows(dataset: TokenDataset, starts: Sequence[int], length: int, documents: bool = False) -> Batch:
    """Return as a batch the ``length`` tokens from each of ``starts`` on, in that order."""
    # One more token than is read: the last one's target.
    tokens = np.stack([dataset.tokens(start, start + length + 1) for start in starts])
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    segments = None
    if documents:
        last = np.zeros(inputs.shape, dtype=np.int64)
        for row, start in zip(last, starts, strict=True):
            row[dataset.document_ends(start, start + length) - start] = 1
        # What follows a document says nothing of it: that target would teach noise.
        targets[last == 1] = IGNORE_INDEX
        segments = torch.from_numpy(np.cumsum(last, axis=1) - last)
    return Batch(torch.from_numpy(inputs.copy()), torch.from_numpy(targets), segments)
