"""Several data sets read side by side, in proportion to weights.

Rows are counted through the whole run, in blocks of ``BLOCK``. In each block a source has its share, evenly spread: the
j-th of its m rows stands somewhere in the j-th of m equal parts of the block, drawn from the seed. So every batch is
near the weights, and how many rows of a source come before a row is known without counting: a run that is continued has
nothing to catch up with.

A source that may be read so many times only has its last row somewhere; there a phase ends, and the others go on in
proportion to their own weights. After the last one's end all go on with their first weights, each from where it is:
such rows are for runs that passed over earlier ones. Who holds to the epochs asks ``rows`` how many come until then.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from samba_lm.data.loader import Batch, Loader, local_rows
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 2**16
_NO_END = 2**62
SOURCE_TABLE = 2**16
"""Up to so many rows a source's order is kept as a table: there may be many sources, all in use."""


@dataclass(frozen=True)
class Part:
    """A source of a mixture.

    Attributes:
        loader: its rows, in its own order.
        weight: its share, in proportion to the sum of all.
        epochs: how often it may be read; None: as often as it takes.
    """

    loader: Loader
    weight: float
    epochs: float | None = None


@dataclass(frozen=True)
class _Phase:
    """Rows from ``first`` on, in which the sources have these ``counts`` in a block; ``read``: rows of each before."""

    first: int
    number: int
    counts: NDArray[np.int64]
    read: NDArray[np.int64]


class Mixture:
    """Training batches of several sources; each is read in its own shuffled order, every row once an epoch.

    Args:
        parts: the sources by name; their order in the mapping does not matter.
        seed: of the order in which sources take turns.

    Raises:
        UserError: no source, a weight that is not positive or less than one row in 65,536, epochs that are not
            positive, sources of different tokenizers or sizes.

    Attributes:
        rows: how many there are until all sources were read as often as they may; None: no end.
    """

    def __init__(self, parts: Mapping[str, Part], seed: int) -> None:
        if not parts:
            raise UserError("The mixture has no sources: name at least one.")
        self.names = sorted(parts)
        self.parts = [parts[name] for name in self.names]
        first = self.parts[0].loader
        self.batch_size, self.length, self._seed = first.batch_size, first.length, seed
        for name, part in zip(self.names, self.parts, strict=True):
            self._check(name, part)
        limits = np.array([_rows(part) for part in self.parts], dtype=np.int64)
        weights = np.array([part.weight for part in self.parts])
        self._block = functools.lru_cache(maxsize=4)(self._arranged)
        self._phases = [_Phase(0, 0, self._counts(weights), np.zeros_like(limits))]
        self.rows = self._plan(limits, weights)

    def _check(self, name: str, part: Part) -> None:
        if not 0 < part.weight < math.inf:
            raise UserError(f"The source {name!r} has the weight {part.weight:g}: it must be more than 0.")
        if part.epochs is not None and not 0 < part.epochs < math.inf:
            raise UserError(f"The source {name!r} may be read {part.epochs:g} times: it must be more than 0.")
        first, loader = self.parts[0].loader, part.loader
        if loader.dataset.meta.tokenizer != first.dataset.meta.tokenizer:
            raise UserError(
                f"The sources {self.names[0]!r} ({first.dataset.folder}) and {name!r} ({loader.dataset.folder}) were "
                "made with different tokenizers: prepare both with one (data prepare --tokenizer FOLDER)."
            )
        assert (loader.batch_size, loader.length, loader.documents) == (self.batch_size, self.length, first.documents)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of ``rank`` in the global batch of ``step`` (from 0), which does not depend on ``world``.

        Raises:
            UserError: the batch does not divide among ``world`` processes.
        """
        sources, ordinals = self.assigned(local_rows(self.batch_size, step, rank, world))
        read, order = [], []
        for source in np.unique(sources):
            places = np.flatnonzero(sources == source)
            read.append(self.parts[source].loader.read(ordinals[places]))
            order.append(places)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        segments = [batch.segments for batch in read if batch.segments is not None]
        return Batch(
            torch.cat([batch.input_ids for batch in read])[back],
            torch.cat([batch.targets for batch in read])[back],
            torch.cat(segments)[back] if segments else None,
        )

    def assigned(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each of ``rows`` (rising) its source's number among ``names``, and its own number in that source."""
        firsts = np.array([phase.first for phase in self._phases])
        phases = np.searchsorted(firsts, rows, side="right") - 1
        sources, ordinals = np.empty_like(rows), np.empty_like(rows)
        for number in np.unique(phases):
            phase = self._phases[number]
            blocks, places = np.divmod(rows - phase.first, BLOCK)
            for block in np.unique(blocks[phases == number]):
                now = (phases == number) & (blocks == block)
                source, before = self._block(int(number), int(block))
                sources[now] = source[places[now]]
                ordinals[now] = phase.read[sources[now]] + block * phase.counts[sources[now]] + before[places[now]]
        return sources, ordinals

    def rows_read(self, steps: int) -> dict[str, int]:
        """How many rows the first ``steps`` steps read of each source."""
        end = steps * self.batch_size
        phase = next(phase for phase in reversed(self._phases) if phase.first <= end)
        blocks, places = divmod(end - phase.first, BLOCK)
        source, _ = self._block(phase.number, blocks)
        within = np.bincount(source[:places], minlength=len(self.names))
        read = phase.read + blocks * phase.counts + within
        return dict(zip(self.names, read.tolist(), strict=True))

    def tokens_read(self, steps: int) -> dict[str, int]:
        """How many tokens the first ``steps`` steps read of each source."""
        return {name: rows * self.length for name, rows in self.rows_read(steps).items()}

    def fingerprint(self) -> str:
        """sha256 of the sources' data, weights and epochs."""
        facts = {
            name: [part.loader.fingerprint(), part.weight / sum(p.weight for p in self.parts), part.epochs]
            for name, part in zip(self.names, self.parts, strict=True)
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _plan(self, limits: NDArray[np.int64], weights: NDArray[np.float64]) -> int | None:
        """Add a phase wherever a source has its last row; ``limits``: how many rows may be read of each.

        Returns how many rows there are when all had their last; None: some have none.
        """
        while (limits[weights > 0] < _NO_END).any():
            now = self._phases[-1]
            left = np.where((weights > 0) & (limits < _NO_END), limits - now.read, _NO_END)
            # In the block where the first source ends, that source's last row.
            block = int(np.min((left - 1) // np.maximum(now.counts, 1)))
            source, before = self._block(now.number, block)
            last = int(np.flatnonzero(block * now.counts[source] + before == left[source] - 1)[0])
            read = now.read + block * now.counts + np.bincount(source[: last + 1], minlength=limits.size)
            weights = np.where(read >= limits, 0, weights)
            first = now.first + block * BLOCK + last + 1
            counts = self._counts(weights) if weights.any() else self._phases[0].counts
            self._phases.append(_Phase(first, now.number + 1, counts, read))
            if not weights.any():
                return first
        return None

    def _arranged(self, number: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each row of a phase's block its source, and how many rows of that source stand before it in the block."""
        counts = self._phases[number].counts
        source = np.repeat(np.arange(counts.size), counts)
        before = np.arange(source.size) - np.repeat(np.cumsum(counts) - counts, counts)
        jitter = np.random.RandomState([self._seed, number, block]).random_sample(source.size)
        order = np.argsort((before + jitter) / counts[source], kind="stable")
        return source[order], before[order]

    def _counts(self, weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many rows of a block each source has: whole numbers nearest to the weights, by largest remainder."""
        exact = weights / weights.sum() * BLOCK
        counts = np.floor(exact).astype(np.int64)
        missing = BLOCK - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        for name, weight, count in zip(self.names, weights, counts, strict=True):
            if weight > 0 and count < 1:
                raise UserError(
                    f"The source {name!r} has the weight {weight:g}, less than one row in {BLOCK:,}: raise it, or "
                    "leave the source out."
                )
        return counts


def _rows(part: Part) -> int:
    """How many rows may be read of a source."""
    return _NO_END if part.epochs is None else max(1, round(part.epochs * part.loader.rows))


def source_seed(seed: int, name: str) -> int:
    """The seed of a source's own order: of its name, so that another source beside it changes nothing."""
    return zlib.crc32(name.encode(), seed)
