"""In which order rows are read: every row once an epoch, each epoch in an order of its own, drawn from the seed.

Rows are counted through all epochs from 0, and an order says where in the stream of tokens each begins. It is a
function of the seed and that number: nothing is kept from row to row, so a run that is continued has nothing to catch
up with, and the memory has a bound however much is shuffled.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from samba_lm.data.permutation import Permutation
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_TABLE = 2**22
"""Up to so many rows an epoch's order is a table (32 MiB at most); beyond, :class:`Permutation` computes it."""


class Order(Protocol):
    """An order of the rows of one data set."""

    rows: int
    """Of an epoch."""

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token that each row begins with."""
        ...

    def shards(self, row: int) -> tuple[Sequence[int], Sequence[int]]:
        """The shards that are read about ``row``, and those that come after them, in the order they come."""
        ...


class Shuffled:
    """All rows of the data set in one order.

    Args:
        rows: windows of ``length`` tokens that the data set holds; window i begins at token ``i * length``.
        shuffle: draws the orders.
        shards: how many there are.
    """

    def __init__(self, rows: int, length: int, shuffle: Shuffle, shards: int) -> None:
        self.rows, self._length, self._shuffle, self._shards = rows, length, shuffle, range(shards)

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(rows, self.rows)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            found[now] = self._shuffle(self.rows, (int(epoch),), places[now])
        return found * self._length

    def shards(self, row: int) -> tuple[Sequence[int], Sequence[int]]:
        return self._shards, ()


class ShuffledInGroups:
    """The shards in an order of their own, and of each ``group`` of them all rows in one order.

    So only the shards of one group need be at hand, and those of the next on their way. A row lies within a shard: what
    is left at a shard's end, less than a row, is not read. A new epoch has other groups.

    Args:
        tokens: of each shard, one after the other.
        length: tokens of a row.
        shuffle: draws the orders.
        group: shards in a group, at least 1; the last group of an epoch may have fewer.

    Raises UserError when no shard is as long as a row.
    """

    def __init__(self, tokens: Sequence[int], length: int, shuffle: Shuffle, group: int, where: str) -> None:
        assert group >= 1
        self._begins = np.cumsum([0, *tokens])
        # One more token than is read: the last one's target.
        self._windows = (np.array(tokens, dtype=np.int64) - 1) // length
        self._long_enough = np.flatnonzero(self._windows)
        self.rows = int(self._windows.sum())
        if self.rows < 1:
            raise UserError(
                f"The largest shard of {where} has {max(tokens):,} tokens, fewer than one row of length {length} needs "
                f"({length + 1:,}), and data.shuffle_shards reads each shard by itself: give a shorter length, larger "
                "shards (data prepare --shard-tokens), or no shuffle_shards."
            )
        self._length, self._shuffle, self._group = length, shuffle, group

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(rows, self.rows)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            order, ends = self._epoch(int(epoch))
            of_epoch = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(ends[self._last_of_groups()], places[of_epoch], side="right")
            for group in np.unique(groups):
                now = of_epoch[groups == group]
                first = int(group) * self._group
                members = order[first : first + self._group]
                sizes = np.cumsum(self._windows[members])
                before = int(ends[first - 1]) if first else 0
                within = self._shuffle(int(sizes[-1]), (int(epoch), int(group)), places[now] - before)
                member = np.searchsorted(sizes, within, side="right")
                window = within - (sizes - self._windows[members])[member]
                found[now] = self._begins[members[member]] + window * self._length
        return found

    def shards(self, row: int) -> tuple[Sequence[int], Sequence[int]]:
        epoch, place = divmod(row, self.rows)
        order, ends = self._epoch(epoch)
        group = int(np.searchsorted(ends[self._last_of_groups()], place, side="right"))
        first, next_one = group * self._group, (group + 1) * self._group
        if next_one >= order.size:  # the next group is the first of the next epoch
            order_after, next_one = self._epoch(epoch + 1)[0], 0
        else:
            order_after = order
        return order[first : first + self._group].tolist(), order_after[next_one : next_one + self._group].tolist()

    def _last_of_groups(self) -> NDArray[np.int64]:
        """Which shard, in an epoch's order, is the last one of each group."""
        count = self._long_enough.size
        return np.minimum(np.arange(self._group - 1, count + self._group - 1, self._group), count - 1)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in the order they are read in, and how many rows have been read after each."""
        count = self._long_enough.size
        order = self._long_enough[self._shuffle(count, (epoch, 2**32 - 1), np.arange(count))]
        return order, np.cumsum(self._windows[order])


class Shuffle:
    """Shuffled orders of whole numbers, each known by a key; the same seed and key give the same order, always.

    Args:
        table: up to so many numbers an order is a table; beyond, :class:`Permutation` computes it.
    """

    def __init__(self, seed: int, table: int = LARGEST_TABLE) -> None:
        self._seed, self._table = seed, table
        self._order = functools.lru_cache(maxsize=4)(self._new)

    def __call__(self, size: int, key: tuple[int, ...], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at ``places`` in the order of ``0 .. size - 1`` that ``key`` gives: int64 of the same shape."""
        order = self._order(size, key)
        return order(places) if isinstance(order, Permutation) else order[places]

    def _new(self, size: int, key: tuple[int, ...]) -> NDArray[np.int64] | Permutation:
        if size > self._table:
            return Permutation(size, (self._seed, *key))
        # RandomState is the one numpy generator whose stream is promised never to change between versions.
        order: NDArray[np.int64] = np.random.RandomState([self._seed, *key]).permutation(size)
        return order
