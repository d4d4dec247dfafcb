from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from samba_lm.data.order import Shuffle, Shuffled, ShuffledInGroups
from samba_lm.errors import UserError

TOKENS = [50, 33, 8, 41, 90, 5, 17, 64, 31]
LENGTH = 8
WINDOWS = [(tokens - 1) // LENGTH for tokens in TOKENS]


def in_groups(seed: int = 3, group: int = 2, table: int = 4) -> ShuffledInGroups:
    return ShuffledInGroups(TOKENS, LENGTH, Shuffle(seed, table), group, "there")


@pytest.mark.parametrize("table", [0, 10, 10**6])
def test_every_row_comes_once_an_epoch(table: int) -> None:
    rows = 100
    order = Shuffled(rows, LENGTH, Shuffle(3, table), 1)
    epochs = order.starts(np.arange(3 * rows)).reshape(3, rows)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(rows) * LENGTH, (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order.starts(np.array([250, 17])).tolist() == [epochs[2, 50], epochs[0, 17]]


def test_a_table_is_what_it_always_was() -> None:
    found = Shuffled(22, 8, Shuffle(7), 1).starts(np.arange(22, 44)) // 8
    assert np.array_equal(found, np.random.RandomState([7, 1]).permutation(22))


@pytest.mark.parametrize("group", [1, 2, 4, 9, 20])
@pytest.mark.parametrize("table", [0, 10**6])
def test_groups_of_shards(group: int, table: int) -> None:
    """Each row once an epoch, within one shard; at any time of no more shards than a group has, as it says itself."""
    order = in_groups(group=group, table=table)
    assert order.rows == sum(WINDOWS)
    begins = np.cumsum([0, *TOKENS])
    every = sorted(begin + i * LENGTH for begin, count in zip(begins, WINDOWS, strict=False) for i in range(count))
    epochs = order.starts(np.arange(4 * order.rows)).reshape(4, -1)
    shard = np.searchsorted(begins, epochs, side="right") - 1
    followed = []
    for epoch in range(4):
        assert sorted(epochs[epoch]) == every
        assert np.array_equal(np.searchsorted(begins, epochs[epoch] + LENGTH, side="right") - 1, shard[epoch])
        for place in range(order.rows):
            now, later = order.shards(epoch * order.rows + place)
            assert shard[epoch, place] in now
            assert len(now) <= group
            if not followed or followed[-1] != (now, later):
                assert not followed or followed[-1][1] == now
                followed.append((now, later))
    if 1 < group < 7:
        assert len({tuple(map(tuple, epochs[i : i + 1])) for i in range(4)}) == 4
        assert len({tuple(now) for now, _ in followed}) > 7 // group + 1, "other groups in other epochs"
    one_by_one = [int(order.starts(np.array([row]))[0]) for row in range(order.rows)]
    assert one_by_one == epochs[0].tolist(), "a row is the same, whatever it is asked for with"


def test_the_seed_decides() -> None:
    rows = np.arange(len(WINDOWS))
    assert np.array_equal(in_groups().starts(rows), in_groups().starts(rows))
    assert not np.array_equal(in_groups().starts(rows), in_groups(seed=4).starts(rows))


def test_shards_shorter_than_a_row() -> None:
    with pytest.raises(UserError, match=r"largest shard of there has 90 tokens, fewer than one row of length 90 needs"):
        ShuffledInGroups(TOKENS, 90, Shuffle(0), 2, "there")


def test_memory_and_time_have_a_bound() -> None:
    """A trillion rows, far into the run: no table is made."""
    for order in (
        Shuffled(10**12, LENGTH, Shuffle(1), 1),
        ShuffledInGroups([2**40 + 1] * 1000, LENGTH, Shuffle(1), 64, "there"),
    ):
        tracemalloc.start()
        starts = order.starts(np.arange(123 * 10**12, 123 * 10**12 + 1024))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.unique(starts).size == 1024
        assert peak < 2**20
