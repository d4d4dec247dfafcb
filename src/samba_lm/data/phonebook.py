"""Phonebook texts (Jelassi et al., 2024): lines of names and numbers, and one name whose number is asked for.

After the book two of its entries are copied as examples of what is asked; the third, in the same form, ends after the
name. Its number stands in the book alone. Training may ask for more of them, one after the other: of a row of thousands
of tokens, then more than one number teaches.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samba_lm.data.recall import Example, WordSplicer, read_text
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

NUMBERS = (6_000_000_000, 10_000_000_000)
"""Numbers have ten digits, the first from 6 to 9."""
EXAMPLES = 2
"""Entries copied before the one that is asked for."""
LEAST_PAIRS = EXAMPLES + 1
_DRAWS = 2000
"""Names drawn from faker's lists, which find almost all of the frequent ones."""
_TRIED = 2048
"""Entries by which a tokenizer shows that it encodes word by word."""


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

    def draw(self, random: np.random.RandomState, count: int) -> list[str]:
        """``count`` names, no two alike. Raises UserError when there are not as many."""
        if count > self.count:
            raise UserError(f"A phonebook of {count} entries needs as many names, and {self.source} has {self.count}.")
        found: dict[int, None] = {}
        while len(found) < count:
            found |= dict.fromkeys(random.randint(self.count, size=count, dtype=np.int64).tolist())
        return [self._name(number) for number in itertools.islice(found, count)]

    def sha256(self) -> str:
        """Of all words."""
        return hashlib.sha256("\n\n".join("\n".join(words) for words in self.lists).encode()).hexdigest()

    def _name(self, number: int) -> str:
        words = []
        for each in reversed(self.lists):
            number, at = divmod(number, len(each))
            words.append(each[at])
        return " ".join(reversed(words))

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
        written as usual. Raises UserError for a file that cannot be read or holds no names, and for more than
        2^63 names in all.
        """
        names = cls(tuple(_read_names(path) for path in paths), " and ".join(map(str, paths)))
        if names.count >= 1 << 63:
            raise UserError(f"{names.source} make more names than can be counted: give fewer files, or shorter ones.")
        return names


def _read_names(path: Path) -> tuple[str, ...]:
    names = [" ".join(re.split(r"[\d\t]", line)[0].split()) for line in read_text(path).splitlines()]
    found = tuple(dict.fromkeys(name.title() if name.isupper() else name for name in names if name))
    if not found:
        raise UserError(f"{path} holds no names: give one a line.")
    bad = next((name for name in found if ":" in name), None)
    if bad is not None:
        raise UserError(f"{path} holds the name {bad!r}: a colon ends a name in a phonebook, so leave such names out.")
    return found


class Phonebook:
    """Makes phonebook texts for a tokenizer, with names from ``names``.

    ``questions``: entries that are asked for after the two examples; fewer in texts where they would take more than a
    third of the lines.
    """

    def __init__(self, tokenizer: Tokenizer, names: Names, questions: int = 1) -> None:
        if questions < 1:
            raise UserError(f"questions is {questions}: a phonebook asks for one entry at least.")
        self.names, self.questions = names, questions
        sample = self._entries(np.random.RandomState(0), min(64, names.count))
        self._splicer = WordSplicer(tokenizer, ["\n\n".join(sample), *sample, *self._books()])
        lines = self._splicer.encode_batch([f"{entry}\n" for entry in sample])
        self._mean = float(np.mean([line.size for line in lines]))

    def example(self, random: np.random.RandomState, length: int) -> Example:
        """A text of at most ``length`` tokens, answer and all, some lines short of it at most.

        Raises UserError where ``length`` has no room for three entries or asks for more names than there are.
        """
        drawn = min(self.names.count, int(1.3 * length / self._mean) + 8)
        entries = self._entries(random, drawn)
        lines = self._splicer.encode_batch([f"{entry}\n" for entry in entries])
        sizes = np.array([line.size for line in lines])
        questions = min(self.questions, max(1, (length // int(sizes.max()) - EXAMPLES) // 3))
        # Two examples and the questions with their answers, each at most a line and a token at either break.
        room = length - (EXAMPLES + questions) * int(sizes.max()) - 6
        count = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
        if count < LEAST_PAIRS:
            least = int((LEAST_PAIRS + 3) * sizes.max()) + 6
            raise UserError(f"length {length} is too short: a phonebook of three entries needs about {least} tokens.")
        if count == drawn == self.names.count:
            raise UserError(
                f"A phonebook of {length} tokens has more entries than {self.names.source} has names "
                f"({self.names.count}): give more names or a shorter length."
            )
        return self._example(random, entries[:count], lines[: count - 1], min(questions, count - EXAMPLES))

    def of_pairs(self, random: np.random.RandomState, pairs: int) -> Example:
        """A text of a book of ``pairs`` entries. Raises UserError for fewer than three, or more than names."""
        if pairs < LEAST_PAIRS:
            raise UserError(
                f"pairs is {pairs}: a phonebook needs {LEAST_PAIRS} entries, two to show and one to ask for."
            )
        entries = self._entries(random, pairs)
        return self._example(random, entries, self._splicer.encode_batch([f"{entry}\n" for entry in entries[:-1]]), 1)

    def facts(self) -> dict[str, object]:
        told: dict[str, object] = {"kind": "phonebook", "names": self.names.source, "names_sha256": self.names.sha256()}
        return told | ({"questions": self.questions} if self.questions > 1 else {})

    def _books(self) -> list[str]:
        """Books of so many entries that a rare name or pair of digits which merges over a border is among them."""
        random, size = np.random.RandomState(1), min(64, self.names.count)
        return ["\n".join(self._entries(random, size)) for _ in range(-(-_TRIED // size))]

    def _entries(self, random: np.random.RandomState, count: int) -> list[str]:
        """Names and their numbers."""
        names = self.names.draw(random, count)
        numbers: list[int] = []
        while len(set(numbers)) < count:  # two of the same would be two answers to one question
            numbers = random.randint(*NUMBERS, size=count, dtype=np.int64).tolist()
        return [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]

    def _example(self, random: np.random.RandomState, entries: list[str], lines: list[Ids], questions: int) -> Example:
        """``lines``: all entries' but the last."""
        shown, also, *asked = random.choice(len(entries), EXAMPLES + questions, replace=False).tolist()
        front = f"{entries[-1]}\n\n{entries[shown]}\n{entries[also]}\n\n"
        pieces = []
        for each in asked:
            name, number = entries[each].split(": ")
            pieces += [f"{name}:", f" {number}", "\n"]
        whole, *told = self._splicer.encode_batch([front + pieces[0], *pieces])
        # What an empty line is encoded to depends on what follows it: so with the first name, which is then cut off.
        cut = whole.size - told[0].size
        head = whole[:cut] if np.array_equal(whole[cut:], told[0]) else self._splicer.encode(front)
        *rest, question, answer, end = told
        document = [*lines, head, *rest]
        ends = np.cumsum([piece.size for piece in document]).tolist()
        answered = tuple((ends[at], ends[at + 2]) for at in range(len(lines) + 1, len(ends), 3))
        return Example(np.concatenate(document), question, answer, end, number, answered)
