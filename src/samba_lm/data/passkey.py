"""Passkey texts: a five-digit key somewhere in much that does not matter, asked for at the end.

The form is that of landmark attention (Mohtashami and Jaggi, 2023) and LongLoRA: a line that says what is to be done,
filler, the key's line, filler, the question. The filler goes round and round through a few sentences, or through the
sentences of any text, which is harder; where it begins is drawn too, so that no place in the text tells the key's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from samba_lm.data.recall import Example, Splicer
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
KEYS = (10_000, 100_000)
"""Keys are drawn evenly from the first number up to, not including, the second."""
MAX_WORDS = 30
"""A longer sentence of a text counts as several, so that lengths come out finely."""


def sentences(text: str) -> list[str]:
    """The sentences of a text, of at most :data:`MAX_WORDS` words, with single spaces between words.

    Raises UserError for a text without words.
    """
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        found += [" ".join(words[i : i + MAX_WORDS]) for i in range(0, len(words), MAX_WORDS)]
    if not found:
        raise UserError("The filler's text holds no words: give another file.")
    return found


class Filler:
    """Sentences that are read round and round, from any one on.

    Args:
        of: the sentences, without white space around them.
    """

    def __init__(self, of: Sequence[str], splicer: Splicer) -> None:
        self.sentences = tuple(of)
        self._splicer = splicer
        self._ids = splicer.encode_batch([f" {sentence}" for sentence in self.sentences])
        self._ends = np.cumsum([ids.size for ids in self._ids])
        self._at_edges: dict[str, Ids] = {}

    def line(self, start: int, most: int) -> tuple[Ids, int]:
        """One line of at most ``most`` tokens, int64 [tokens]: sentence ``start`` and those after it, and how many.

        One more sentence would not fit; where none does, there is no line.
        """
        count = self._count(start, most)
        while count:
            pieces = self._pieces(start, count)
            if sum(piece.size for piece in pieces) <= most:
                return np.concatenate(pieces), count
            count -= 1  # the line break had no room
        return np.empty(0, dtype=np.int64), 0

    def _count(self, start: int, most: int) -> int:
        """How many sentences from ``start`` on have at most ``most`` tokens, without the line break."""
        before = int(self._ends[start - 1]) if start else 0
        rounds, rest = divmod(before + most, int(self._ends[-1]))
        return rounds * len(self._ids) + int(np.searchsorted(self._ends, rest, side="right")) - start

    def _pieces(self, start: int, count: int) -> list[Ids]:
        size = len(self._ids)
        last = (start + count - 1) % size
        if count == 1:
            return [self._edge(f"{self.sentences[start]}\n")]
        middle = [self._ids[i % size] for i in range(start + 1, start + count - 1)]
        return [self._edge(self.sentences[start]), *middle, self._edge(f" {self.sentences[last]}\n")]

    def _edge(self, text: str) -> Ids:
        """A sentence as it stands at the beginning or the end of a line."""
        if text not in self._at_edges:
            self._at_edges[text] = self._splicer.encode(text)
        return self._at_edges[text]


class Passkey:
    """Makes passkey texts for a tokenizer.

    Args:
        text: whose sentences are the filler; None: those of the well-known form, :data:`FILLER`. A number in it is
            never taken as a key, so that the key stands in its own line only.

    Raises UserError for a text without words, or one with so many numbers that no key is left.
    """

    def __init__(self, tokenizer: Tokenizer, text: str | None = None) -> None:
        self._splicer = Splicer(tokenizer)
        self.filler = Filler(FILLER if text is None else sentences(text), self._splicer)
        self._sha256 = None if text is None else hashlib.sha256(text.encode()).hexdigest()
        runs = re.findall(r"\d{5,}", " ".join(self.filler.sentences))
        self._taken = {run[i : i + 5] for run in runs for i in range(len(run) - 4)}
        if all(str(key) in self._taken for key in range(*KEYS)):
            raise UserError("The filler's text holds every five-digit number, so no key is left: give another text.")
        self._task, self._question = self._splicer.encode_batch([TASK, QUESTION])
        self._end = self._splicer.encode("\n")

    def example(self, random: np.random.RandomState, length: int, depth: float | None = None) -> Example:
        """A text of at most ``length`` tokens, answer and all; a whole sentence more would not fit.

        Args:
            random: draws the key, where the filler begins and, where it is None, the depth.
            depth: how much of the filler, 0 to 1, stands before the key.

        Raises UserError for a depth outside 0 to 1, or a length that the lines without filler do not fit in.
        """
        depth = random.random_sample() if depth is None else depth
        if not 0 <= depth <= 1:
            raise UserError(f"depth is {depth}: it must be from 0 (the key first) to 1 (just before the question).")
        key = self._key(random)
        start = random.randint(len(self.filler.sentences))
        line, answer = self._splicer.encode_batch([KEY_LINE.format(key=key), f" {key}"])
        rest = sum(ids.size for ids in (self._task, line, self._question, answer, self._end))
        room = length - rest
        if room < 0:
            raise UserError(
                f"length {length} is too short: the lines of a passkey text have {rest} tokens without any filler."
            )
        before, count = self.filler.line(start, round(depth * room))
        after_room = 0 if depth == 1 else room - before.size
        after, _ = self.filler.line((start + count) % len(self.filler.sentences), after_room)
        document = np.concatenate((self._task, before, line, after))
        begins = self._task.size, self._task.size + before.size + line.size
        filler = tuple((begin, begin + ids.size) for begin, ids in zip(begins, (before, after), strict=True))
        return Example(document, self._question, answer, self._end, key, filler=filler)

    def check(self, length: int) -> None:
        """Raise UserError for a length that the lines without filler do not fit in."""
        self.example(np.random.RandomState(0), length)

    def facts(self) -> dict[str, object]:
        return {"kind": "passkey", "filler_sha256": self._sha256}

    def _key(self, random: np.random.RandomState) -> str:
        while True:
            key = str(random.randint(*KEYS))
            if key not in self._taken:
                return key
