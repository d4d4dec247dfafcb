"""Batches of conversations: several in a row, each a document of its own, of which the answers count.

As with :class:`samba_lm.data.loader.Loader`, a batch is a function of the seed and the step, on any number of ranks.
Which conversations share a row is decided once, by their lengths; each epoch reads every row once, in an order of its
own. What lies beside a conversation changes nothing about it: state and attention begin anew with each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from samba_lm.data.conversation_set import ConversationSet
from samba_lm.data.loader import Batch, local_rows
from samba_lm.data.packing import pack
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ConversationRows:
    """A set's conversations in rows of ``length`` tokens.

    A conversation of n tokens takes n - 1 places: its last token is only told. One that is longer than a row is cut at
    the row's end, or left out where no answer begins before that.

    Attributes:
        rows: how many there are.
        cut, dropped: conversations that were.

    Raises UserError for a length that is not positive, or where no answer fits.
    """

    def __init__(self, conversations: ConversationSet, length: int) -> None:
        if length < 1:
            raise UserError(f"The sequence length is {length}: it must be at least 1.")
        self.conversations, self.length = conversations, length
        lengths = conversations.lengths() - 1
        kept = lengths >= 1
        long = np.flatnonzero(lengths > length)
        kept[long] = [bool(conversations.read(int(i), length + 1)[1][1:].any()) for i in long]
        self.cut, self.dropped = int(kept[long].sum()), int((~kept).sum())
        self._kept = np.flatnonzero(kept)
        if not self._kept.size:
            raise UserError(
                f"{conversations.name}: no answer begins within a row of {length} tokens (the longest of "
                f"{len(conversations)} conversations has {int(lengths.max()) + 1}): raise train.length."
            )
        self._packed = pack(lengths[self._kept], length)
        self.rows = self._packed.rows

    def note(self) -> str | None:
        """What was cut or left out, in words; None: nothing."""
        if not (self.cut or self.dropped):
            return None
        longest = int(self.conversations.lengths().max()) - 1
        return (
            f"{self.conversations.name}: of {len(self.conversations):,} conversations {self.cut:,} are cut at the "
            f"row's {self.length:,} tokens and {self.dropped:,} left out, with no answer before that; the longest "
            f"needs train.length = {longest}."
        )

    def read(self, rows: Iterable[int]) -> Batch:
        """Rows as a batch. What is left of a row is one more document, of separators, from which nothing is learnt."""
        parts = [self._row(int(row)) for row in rows]
        ids, targets, segments = (torch.from_numpy(np.stack(each)) for each in zip(*parts, strict=True))
        return Batch(ids, targets, segments)

    def _row(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        length = self.length
        ids = np.full(length, self.conversations.tokenizer.eos_id, dtype=np.int64)
        targets = np.full(length, IGNORE_INDEX, dtype=np.int64)
        texts = self._kept[self._packed.row(row)]
        segments = np.full(length, texts.size, dtype=np.int64)
        start = 0
        for number, text in enumerate(texts.tolist()):
            tokens, answers = self.conversations.read(text, length - start + 1)
            stop = start + tokens.size - 1
            ids[start:stop] = tokens[:-1]
            targets[start:stop] = np.where(answers[1:], tokens[1:], IGNORE_INDEX)
            segments[start:stop] = number
            start = stop
        return ids, targets, segments


class ConversationLoader:
    """Training batches of ``batch_size`` rows over all ranks. Raises UserError for sizes that are not positive, too."""

    def __init__(self, conversations: ConversationSet, batch_size: int, length: int, seed: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}: it must be from 0 to {2**32 - 1}.")
        self.conversations, self.batch_size, self.length, self._seed = conversations, batch_size, length, seed
        self.packed = ConversationRows(conversations, length)

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return self.packed.rows

    def fingerprint(self) -> str:
        """sha256 of the conversations and of what wrote them out."""
        return self.conversations.sha256

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of ``rank`` in the global batch of ``step`` (from 0), which does not depend on ``world``.

        Raises UserError when the batch does not divide among ``world`` processes.
        """
        return self.read(local_rows(self.batch_size, step, rank, world))

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """The rows of these numbers, counted through all epochs, in this order."""
        places = (divmod(row, self.rows) for row in rows.tolist())
        return self.packed.read(int(_permutation(self.rows, self._seed, epoch)[at]) for epoch, at in places)


class ConversationValidation:
    """The first ``sequences`` rows of held-out conversations (all where there are fewer), ``rows`` a batch.

    Of several processes, the ``rank``-th of ``world`` has its share; all make as many batches of the same sizes: where
    the rows do not divide, some process's last one has no targets that count.
    """

    def __init__(
        self, conversations: ConversationSet, sequences: int, rows: int, length: int, rank: int = 0, world: int = 1
    ) -> None:
        self.packed, self.rows = ConversationRows(conversations, length), rows
        self.sequences = min(sequences, self.packed.rows)
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[Batch]:
        share = -(-self.sequences // self._world)
        for first in range(0, share, self.rows):
            wanted = [i * self._world + self._rank for i in range(first, min(first + self.rows, share))]
            batch = self.packed.read(min(row, self.sequences - 1) for row in wanted)
            missing = torch.tensor([row >= self.sequences for row in wanted])
            yield replace(batch, targets=batch.targets.masked_fill(missing[:, None], IGNORE_INDEX))


@functools.lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # As the loader of shards does it: the one generator of numpy whose stream never changes.
    order: NDArray[np.int64] = np.random.RandomState([seed, epoch]).permutation(rows)
    return order
