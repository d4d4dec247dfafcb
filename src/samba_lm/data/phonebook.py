"""Phonebook texts (Jelassi et al., 2024): lines of names and numbers, and one name whose number is asked for.

After the book two of its entries are copied as examples of what is asked; the third, in the same form, ends after the
name. Its number stands in the book alone. Training may ask for more of them, one after the other: of a row of thousands
of tokens, then more than one number teaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from samba_lm.data.entries import Entries, draw
from samba_lm.data.names import Names
from samba_lm.data.recall import Example, Splicer
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

EXAMPLES = 2
"""Entries copied before the one that is asked for."""
LEAST_PAIRS = EXAMPLES + 1
_TRIES = 1000
"""Draws of a row that is hardly long enough, of which some have names too long for it."""


class Phonebook:
    """Makes phonebook texts for a tokenizer, with names from ``names``.

    ``questions``: entries that are asked for after the two examples; fewer in texts where they would take more than a
    third of the lines.
    """

    def __init__(self, tokenizer: Tokenizer, names: Names, questions: int = 1) -> None:
        if questions < 1:
            raise UserError(f"questions is {questions}: a phonebook asks for one entry at least.")
        if names.count < LEAST_PAIRS:
            raise UserError(f"{names.source} makes {names.count} names: a phonebook needs {LEAST_PAIRS} at least.")
        self.names, self.questions = names, questions
        self._entries = Entries(names, Splicer(tokenizer))
        _, sizes = self._entries.encode(*draw(names, np.random.RandomState(0), min(64, names.count)))
        self._mean, self._longest = float(sizes.sum(1).mean()), int(sizes.sum(1).max())

    def example(self, random: np.random.RandomState, length: int) -> Example:
        """A text of at most ``length`` tokens, answer and all, some lines short of it at most.

        Raises UserError where ``length`` has no room for three entries or asks for more names than there are.
        """
        for _ in range(_TRIES):
            if (example := self._drawn(random, length)) is not None:
                return example
        raise self._too_short(length)

    def check(self, length: int) -> None:
        """Raise UserError for a length that most draws have no room in: of fewer, one may find no row."""
        draws = [self._drawn(np.random.RandomState(seed), length) for seed in range(8)]
        if draws.count(None) > len(draws) // 2:
            raise self._too_short(length)

    def _drawn(self, random: np.random.RandomState, length: int) -> Example | None:
        """An example of one draw; None where there is no room for three of its entries."""
        drawn = min(self.names.count, int(1.3 * length / self._mean) + 8)
        names, numbers = draw(self.names, random, drawn)
        ids, pieces = self._entries.encode(names, numbers)
        sizes = pieces.sum(1)
        longest, ends = int(sizes.max()), np.cumsum(sizes)
        questions = min(self.questions, max(1, (length // longest - EXAMPLES) // 3))
        # Two examples and the questions with their answers, each at most a line and a token at either break.
        room = length - (EXAMPLES + questions) * longest - 6
        count = int(np.searchsorted(ends, room, side="right"))
        if count < LEAST_PAIRS:
            return None
        if count == drawn == self.names.count:
            raise UserError(
                f"A phonebook of {length} tokens has more entries than {self.names.source} has names "
                f"({self.names.count}): give more names or a shorter length."
            )
        book = ids[: ends[count - 2]]
        return self._example(random, book, names[:count], numbers[:count], min(questions, count - EXAMPLES))

    def of_pairs(self, random: np.random.RandomState, pairs: int) -> Example:
        """A text of a book of ``pairs`` entries. Raises UserError for fewer than three, or more than names."""
        if pairs < LEAST_PAIRS:
            raise UserError(
                f"pairs is {pairs}: a phonebook needs {LEAST_PAIRS} entries, two to show and one to ask for."
            )
        names, numbers = draw(self.names, random, pairs)
        book, _ = self._entries.encode(names[:-1], numbers[:-1])
        return self._example(random, book, names, numbers, 1)

    def _too_short(self, length: int) -> UserError:
        least = (LEAST_PAIRS + 3) * self._longest + 6
        return UserError(f"length {length} is too short: a phonebook of three entries needs about {least} tokens.")

    def facts(self) -> dict[str, object]:
        told: dict[str, object] = {"kind": "phonebook", "names": self.names.source, "names_sha256": self.names.sha256()}
        return told | ({"questions": self.questions} if self.questions > 1 else {})

    def _example(self, random: np.random.RandomState, book: Ids, names: Ids, numbers: Ids, questions: int) -> Example:
        """``book``: all entries' lines but the last."""
        shown = random.choice(names.size, EXAMPLES + questions, replace=False)
        told = np.array([names.size - 1, *shown])
        ids, pieces = self._entries.encode(names[told], numbers[told], blank=(0, EXAMPLES))
        tokens = np.concatenate((book, ids))
        ends = book.size + np.cumsum(pieces)
        asked = ends[3 * EXAMPLES + 2 :].tolist()  # before each name, after it, after its number, and so on
        answered = tuple(zip(asked[1:-3:3], asked[3:-3:3], strict=True))
        document, question, answer, end = np.split(tokens, asked[-4:-1])
        return Example(document, question, answer, end, str(numbers[told[-1]]), answered)
