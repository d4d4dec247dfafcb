"""Names of people, as lists of words that are combined."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samba_lm.data.recall import read_text
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DRAWS = 2000
"""Names drawn from faker's lists, which find almost all of the frequent ones."""


@dataclass(frozen=True)
class Names:
    """Every combination of a word from each list, in order: ("Mary", "Ann") and ("Moe",) make two names.

    ``source`` says where they come from.
    """

    lists: tuple[tuple[str, ...], ...]
    source: str

    @property
    def count(self) -> int:
        return math.prod(map(len, self.lists))

    def draw(self, random: np.random.RandomState, count: int) -> NDArray[np.int64]:
        """``count`` names' numbers, no two alike, int64 [count]. Raises UserError when there are not as many."""
        if count > self.count:
            raise UserError(f"A phonebook of {count} entries needs as many names, and {self.source} has {self.count}.")
        found: dict[int, None] = {}
        while len(found) < count:
            found |= dict.fromkeys(random.randint(self.count, size=count, dtype=np.int64).tolist())
        return np.fromiter(found, np.int64, count)

    def name(self, number: int) -> str:
        """The name of that number, from 0: the last list's words change fastest."""
        words = []
        for each in reversed(self.lists):
            number, at = divmod(number, len(each))
            words.append(each[at])
        return " ".join(reversed(words))

    def sha256(self) -> str:
        """Of all words."""
        return hashlib.sha256("\n\n".join("\n".join(words) for words in self.lists).encode()).hexdigest()

    @classmethod
    def from_faker(cls, seed: int = 0) -> Names:
        """American first and last names. Raises UserError where the extra is not installed."""
        try:
            from faker import VERSION, Faker
        except ImportError:
            raise UserError(
                "Names come from the package faker: pip install 'samba-lm[recall]', or give lists of names."
            ) from None
        fake = Faker("en_US")
        fake.seed_instance(seed)
        first = sorted({fake.first_name() for _ in range(_DRAWS)})
        last = sorted({fake.last_name() for _ in range(_DRAWS)})
        return cls((tuple(first), tuple(last)), f"faker {VERSION}")

    @classmethod
    def from_files(cls, paths: Sequence[Path]) -> Names:
        """One file of whole names, or one of first names and one of last names: a name a line, packed or not.

        What follows a name from its line's first digit on, such as a frequency, is left out; names in capitals are
        written as usual. Raises UserError for a file that cannot be read or holds no names, for more than 2^63 names in
        all, and for two of first and last names that are put together to the same.
        """
        names = cls(tuple(_read_names(path) for path in paths), " and ".join(map(str, paths)))
        if names.count >= 1 << 63:
            raise UserError(f"{names.source} make more names than can be counted: give fewer files, or shorter ones.")
        if len(names.lists) == 2 and (twice := _made_twice(*names.lists)):
            raise UserError(
                f"{names.source} make the name {twice!r} in two ways, so a phonebook could hold it twice: leave one of "
                "its parts out."
            )
        return names


def _made_twice(firsts: tuple[str, ...], lasts: tuple[str, ...]) -> str:
    """A name that two pairs make, as "Mary" and "Ann Lee" make that of "Mary Ann" and "Lee"; "" where there is none."""
    known, ends = set(firsts), set(lasts)
    beginnings = {head: f"{head} {tail}" for last in lasts for head, tail in _halves(last) if tail in ends}
    pairs = ((head, beginnings.get(tail)) for first in firsts for head, tail in _halves(first) if head in known)
    return next((f"{head} {last}" for head, last in pairs if last is not None), "")


def _halves(name: str) -> list[tuple[str, str]]:
    """A name of several words, cut at each space."""
    words = name.split(" ")
    return [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]


def _read_names(path: Path) -> tuple[str, ...]:
    names = [" ".join(re.split(r"[\d\t]", line)[0].split()) for line in read_text(path).splitlines()]
    found = tuple(dict.fromkeys(name.title() if name.isupper() else name for name in names if name))
    if not found:
        raise UserError(f"{path} holds no names: give one a line.")
    bad = next((name for name in found if ":" in name), None)
    if bad is not None:
        raise UserError(f"{path} holds the name {bad!r}: a colon ends a name in a phonebook, so leave such names out.")
    return found
