"""A phonebook's entries as tokens, put together by indexing.

While Python makes a row's text, it launches nothing on a GPU, and a small model's step waits. So entries are drawn as
numbers, of which every word's ids are looked up, without becoming text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from samba_lm.data.names import Names
from samba_lm.data.recall import Splicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

NUMBERS = (6_000_000_000, 10_000_000_000)
"""Numbers have ten digits, the first from 6 to 9."""
_GROUPS = ((10**7, 1000), (10**4, 1000), (10, 1000), (1, 10))
"""Divisor and modulus of a number's digits, in three and three and three and one."""
_ENDS = ("\n", "\n\n")
_BOOK, _BOOKS = 64, 32
"""Entries of a book, and books, by which a tokenizer shows that it encodes word by word."""


class Entries:
    """What lines ``NAME: NUMBER`` are encoded to, in three pieces each: the name with its colon, the number, the end.

    Every word is encoded once, and every group of three digits. That is right for a tokenizer that cuts between words,
    and numbers after every digit or every third. Any other has its pieces encoded as texts, several times as slowly;
    which it is, it shows in books of ``names``.
    """

    def __init__(self, names: Names, splicer: Splicer) -> None:
        self._names, self._splicer = names, splicer
        *begins, last = [[f"{' ' if at else ''}{word}" for word in words] for at, words in enumerate(names.lists)]
        threes = [f"{number:03}" for number in range(1000)]
        digits = ([f" {three}" for three in threes], threes, threes, [*"0123456789"])
        columns = [*begins, [f"{word}:" for word in last], *digits, [*_ENDS]]
        words = splicer.encode_batch([word for column in columns for word in column])
        words[-1] = self._empty_line(words[-1], columns[0][0], words[0])
        self._ids, self._sizes = np.concatenate(words), np.array([word.size for word in words])
        self._begins = np.cumsum(self._sizes) - self._sizes
        self._firsts = np.cumsum([0, *map(len, columns[:-1])])
        self._by_word = self._shown()

    def encode(self, names: Ids, numbers: Ids, blank: Collection[int] = ()) -> tuple[Ids, Ids]:
        """Ids of the lines one after the other, int64 ``[tokens]``, and each piece's count of them, ``[lines, 3]``.

        Args:
            names: the names' numbers, int64 ``[lines]``.
            numbers: int64 ``[lines]``.
            blank: lines with an empty one behind them; not the last.
        """
        return (self._looked_up if self._by_word else self._encoded)(names, numbers, blank)

    def _looked_up(self, names: Ids, numbers: Ids, blank: Collection[int]) -> tuple[Ids, Ids]:
        words = np.unravel_index(names, [len(each) for each in self._names.lists])
        groups = [numbers // divisor % modulus for divisor, modulus in _GROUPS]
        which = np.stack((*words, *groups, np.zeros_like(names)), axis=1)
        which[list(blank), -1] = 1
        which += self._firsts
        sizes = self._sizes[which]
        # A token of a line is one of the words', moved by what lies between where its word is and where it goes.
        moved = np.repeat(self._begins[which].ravel() + sizes.ravel() - np.cumsum(sizes), sizes.ravel())
        ids = self._ids[np.arange(moved.size) + moved]
        return ids, np.add.reduceat(sizes, [0, len(words), len(words) + len(groups)], axis=1)

    def _encoded(self, names: Ids, numbers: Ids, blank: Collection[int]) -> tuple[Ids, Ids]:
        pieces = self._pieces(names, numbers, blank)
        told = self._splicer.encode_batch(pieces)
        for line in blank:
            end, name = 3 * line + 2, 3 * line + 3
            told[end] = self._empty_line(told[end], pieces[name], told[name])
        return np.concatenate(told), np.array([piece.size for piece in told]).reshape(-1, 3)

    def _pieces(self, names: Ids, numbers: Ids, blank: Collection[int]) -> list[str]:
        lines = zip(map(self._names.name, names.tolist()), numbers.tolist(), strict=True)
        said = ((f"{name}:", f" {number}", _ENDS[at in blank]) for at, (name, number) in enumerate(lines))
        return [piece for line in said for piece in line]

    def _empty_line(self, alone: Ids, name: str, ids: Ids) -> Ids:
        """What it is encoded to depends on what follows it: so with that, which is then cut off."""
        whole = self._splicer.encode(f"{_ENDS[1]}{name}")
        return whole[: -ids.size] if np.array_equal(whole[-ids.size :], ids) else alone

    def _shown(self) -> bool:
        """Books of so many entries that a rare name or pair of digits which merges over a border is among them."""
        random, size = np.random.RandomState(1), min(_BOOK, self._names.count)
        return all(self._same(*draw(self._names, random, size)) for _ in range(_BOOKS))

    def _same(self, names: Ids, numbers: Ids) -> bool:
        blank = range(0, names.size - 1, 2)
        whole = self._splicer.encode("".join(self._pieces(names, numbers, blank)))
        return np.array_equal(whole, self._looked_up(names, numbers, blank)[0])


def draw(names: Names, random: np.random.RandomState, count: int) -> tuple[Ids, Ids]:
    """``count`` names' numbers, no two alike, and as many numbers, no two alike either: int64 [count] both."""
    drawn = names.draw(random, count)
    while True:
        numbers = random.randint(*NUMBERS, size=count, dtype=np.int64)
        if len(set(numbers.tolist())) == count:  # two of the same would be two answers to one question
            return drawn, numbers
