"""Texts with one thing to be found again: an example, and encoding it piece by piece.

:mod:`samba_lm.data.passkey` and :mod:`samba_lm.data.phonebook` make them, :mod:`samba_lm.data.recall_loader` trains on
them, :mod:`samba_lm.eval.recall` asks for the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from samba_lm.data.sources import ReadOptions, find_files, read_file
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """A text, a question about it and the answer, all ids int64 [tokens]; one after the other they are the whole.

    Attributes:
        document: what holds the answer; the state at its end is all that the answer can come from.
        question: comes after it and says nothing of the answer.
        answer: what is to be written next.
        end: closes the answer, so that a trained model writes no more.
        text: the answer in characters, without the space before it.
        answered: where in the document other answers stand, each with its end (first token, one past the last): for
            training, questions that were asked before.
        filler: where in the document stands what does not matter (first token, one past the last).
    """

    document: Ids
    question: Ids
    answer: Ids
    end: Ids
    text: str
    answered: tuple[tuple[int, int], ...] = ()
    filler: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> Ids:
        """The whole, int64 [len(self)]."""
        return np.concatenate((self.document, self.question, self.answer, self.end))

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the answer."""
        return self.document.size + self.question.size

    def __len__(self) -> int:
        return self.prompt_tokens + self.answer.size + self.end.size


class Maker(Protocol):
    """Makes examples by chance."""

    def example(self, random: np.random.RandomState, length: int) -> Example:
        """One of at most ``length`` tokens, and about as many."""

    def check(self, length: int) -> None:
        """Raise UserError for a length that not every draw finds an example for."""

    def facts(self) -> dict[str, object]:
        """Plain data that, with the generator and the tokenizer, decides every example."""


def read_text(path: Path) -> str:
    """The text of a file that :mod:`samba_lm.data.sources` reads, packed or not; documents become lines.

    Raises UserError where it cannot be read or is not UTF-8.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a text file.")
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the path of a text file.")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: give a file with text in it.")
    (file,) = find_files([path])
    pieces = read_file(file, ReadOptions())
    return "".join(f"{piece.text}\n" if piece.end else piece.text for piece in pieces)


class Splicer:
    """Encodes the pieces of a text so that, put together, they are what the whole text would be encoded to.

    That holds for tokenizers that cut before spaces and after line breaks, as all byte-level ones do, if every piece
    begins at such a place. Encoding each piece once, instead of whole texts, makes long rows at the speed of copying.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = {left: tokenizer.encode(left) for left in (".", ".\n")}

    def encode(self, piece: str) -> Ids:
        """The ids of one piece, int64 [tokens]."""
        return self.encode_batch([piece])[0]

    def encode_batch(self, pieces: Sequence[str]) -> list[Ids]:
        """The ids of each piece: of one that begins with a space as it stands in a line, of others as a line's first.

        Some tokenizers mark the beginning of a text, so each is encoded behind another and that one is cut off.
        """
        lefts = ["." if piece[:1].isspace() else ".\n" for piece in pieces]
        whole = self._tokenizer.encode_batch([left + piece for left, piece in zip(lefts, pieces, strict=True)])
        return [self._cut(ids, left, piece) for ids, left, piece in zip(whole, lefts, pieces, strict=True)]

    def _cut(self, ids: Ids, left: str, piece: str) -> Ids:
        before = self._before[left]
        if np.array_equal(ids[: before.size], before):
            return ids[before.size :]
        return self._tokenizer.encode(piece)  # a token reaches over the border
