from __future__ import annotations

import numpy as np
import pytest

from samba_lm.data.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000, 4097, 99_991, 2**17])
def test_every_number_comes_once(size: int) -> None:
    order = Permutation(size, (1, 2))(np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


def test_the_key_decides() -> None:
    places = np.arange(1000)
    first = Permutation(1000, (1, 2))(places)
    assert np.array_equal(Permutation(1000, (1, 2))(places[::-1])[::-1], first)
    for key in ((1, 3), (2, 2), (1, 2, 0)):
        assert not np.array_equal(Permutation(1000, key)(places), first)


def test_order_is_pinned() -> None:
    # A change of these numbers is a change of every large run that resumes: it must not come by accident.
    assert Permutation(10**12 + 39, (7, 0))(np.array([0, 1, 2, 10**12])).tolist() == [
        *(494740689990, 694255504442, 732423381251, 710429116313)
    ]


def test_numbers_are_spread_evenly() -> None:
    """Of many keys: each number is as often at each place; neighbours are apart; no place says anything of the next."""
    size, keys = 12, 2500
    orders = np.array([Permutation(size, (key,))(np.arange(size)) for key in range(keys)])
    counts = np.array([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    expected = keys / size
    chi = ((counts - expected) ** 2 / expected).sum()  # (size - 1)^2 degrees of freedom
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)
    pairs = np.bincount(orders[:, 3] * size + orders[:, 4], minlength=size * size)
    pairs = pairs[[i * size + j for i in range(size) for j in range(size) if i != j]]
    expected = keys / pairs.size
    assert abs(((pairs - expected) ** 2 / expected).sum() - pairs.size) < 5 * np.sqrt(2 * pairs.size)


@pytest.mark.parametrize("size", [2**23 + 9, 10**10])
def test_a_large_one_looks_shuffled(size: int) -> None:
    for first in (0, size // 2):
        found = Permutation(size, (3,))(np.arange(first, first + 20_000)) / size
        histogram = np.histogram(found, bins=50, range=(0, 1))[0]
        assert abs(((histogram - 400) ** 2 / 400).sum() - 49) < 5 * np.sqrt(98)
        for lag in (1, 2, 3, 64):
            assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 0.04
