"""Two sources of training batches that take turns."""

from __future__ import annotations

import hashlib

from samba_lm.data.loader import Batch, Batches
from samba_lm.errors import UserError


class Interleaved:
    """Steps of two kinds, evenly spread: a share of them read ``some``, all others ``others``.

    Each source is read in its own order, as if the other were not there, so a run still resumes by its step alone.
    Raises UserError for a share outside 0 to 1, or sources whose batches are not of one size.
    """

    def __init__(self, some: Batches, others: Batches, share: float) -> None:
        if not 0 < share < 1:
            raise UserError(f"share is {share:g}: it must be more than 0 and less than 1.")
        if (some.batch_size, some.length) != (others.batch_size, others.length):
            raise UserError(
                f"Batches of {some.batch_size} x {some.length} tokens cannot take turns with batches of "
                f"{others.batch_size} x {others.length}."
            )
        self.some, self.others, self.share = some, others, share
        self.batch_size, self.length = some.batch_size, some.length

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of ``rank`` in the global batch of ``step``, from 0."""
        before, after = self.before(step), self.before(step + 1)
        if after > before:
            return self.some.batch(before, rank, world)
        return self.others.batch(step - before, rank, world)

    def before(self, step: int) -> int:
        """How many of the steps before ``step`` read ``some``."""
        return int(step * self.share)

    def fingerprint(self) -> str:
        """sha256 of the data."""
        return hashlib.sha256(f"{self.some.fingerprint()} {self.others.fingerprint()}".encode()).hexdigest()
