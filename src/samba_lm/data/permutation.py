"""A shuffled order that is never written down: memory and time do not depend on how much is shuffled.

The numbers below ``size`` are written as pairs ``(left, right)`` with ``left < A`` and ``right < B``, A and B being
about the square root of ``size``. Each round of a Feistel network adds to one of the two a keyed hash of the other,
which can be undone, so it is a permutation of all ``A * B`` pairs; a pair that stands for no number is sent through
again until one comes out that does (fewer than ``A`` do not).

Source: J. Black and P. Rogaway, Ciphers with Arbitrary Finite Domains (2002), the generalised Feistel cipher and cycle
walking. Ours need only look random, not keep secrets; the hash is the finaliser of splitmix64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDS = 8


class Permutation:
    """A permutation of ``0 .. size - 1``, one of very many, chosen by ``key``.

    Args:
        size: from 1 to 2^48.
        key: numbers from 0 to 2^32 - 1; the same ones give the same permutation, on every machine.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        assert 1 <= size <= 2**48
        self.size = size
        self._left = math.isqrt(size - 1) + 1  # the square root, rounded up
        self._right = -(-size // self._left)
        # RandomState is the one numpy generator whose stream is promised never to change between versions.
        random = np.random.RandomState([*key])
        self._keys = random.randint(0, 2**64, size=_ROUNDS, dtype=np.uint64)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at ``places``: int64 of the same shape, each from 0 to ``size - 1``."""
        assert places.size == 0 or (places.min() >= 0 and places.max() < self.size)
        found = self._network(places.astype(np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(numbers, np.uint64(self._right))
        for i in range(0, _ROUNDS, 2):
            left = (left + _hash(right ^ self._keys[i])) % np.uint64(self._left)
            right = (right + _hash(left ^ self._keys[i + 1])) % np.uint64(self._right)
        return left * np.uint64(self._right) + right


def _hash(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers of 63 bits in which every bit of the input shows: splitmix64's finaliser, its last bit left out so that
    what is added to it does not wrap around."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (numbers ^ (numbers >> np.uint64(31))) >> np.uint64(1)
