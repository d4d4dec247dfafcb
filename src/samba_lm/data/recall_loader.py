"""Training on recall: rows that are made as they are needed, of which the answers count.

As with :class:`samba_lm.data.loader.Loader`, a batch is a function of the seed and the step, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samba_lm.data.loader import Batch
from samba_lm.data.recall import Example, Maker
from samba_lm.errors import UserError
from samba_lm.loss import IGNORE_INDEX
from samba_lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Curriculum:
    """Lengths one after the other, each for a share of the steps.

    Attributes:
        lengths: tokens of a row.
        shares: of the steps, one for each length; they count in proportion to their sum.
        steps: of the whole run.
        review: share of the steps, drawn, that have one of the lengths before their own instead, each as often.

    Raises UserError for lists that do not fit each other, or numbers that are not positive.
    """

    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    steps: int
    review: float = 0.0

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.shares) or not self.lengths:
            raise UserError(f"There are {len(self.lengths)} lengths but {len(self.shares)} shares: give one for each.")
        if min(self.lengths) < 1 or min(self.shares) <= 0 or not math.isfinite(sum(self.shares)):
            raise UserError(f"lengths {list(self.lengths)} and shares {list(self.shares)} must all be more than 0.")
        if not 0 <= self.review < 1:
            raise UserError(f"review is {self.review}: it must be at least 0 and less than 1.")

    def length(self, step: int) -> int:
        """Tokens of a row in ``step``, from 0; after the last step, as in the part for the last length."""
        ends = np.cumsum(self.shares) / sum(self.shares) * self.steps
        at = min(int(np.searchsorted(ends, step, side="right")), len(self.lengths) - 1)
        # Drawn, not every so many steps: what is logged every so many meets all lengths, each in its share.
        place = np.random.RandomState(step).random_sample() if self.review and at else 1.0
        return self.lengths[int(place / self.review * at) if place < self.review else at]


class RecallLoader:
    """Batches of examples, one a row.

    A row is filled up with separators. Targets are the answer and its end; besides, for each of these, ``lm_weight``
    tokens of the document, drawn from all of its places. So the loss is, but for a factor, the mean of the answers plus
    ``lm_weight`` times an estimate of the mean of the whole document.

    Args:
        maker: makes the examples.
        tokenizer: its separator fills rows up.
        batch_size: rows of a batch, over all ranks, at ``length``; where the curriculum is shorter there are as many
            more rows as make the same number of tokens.
        length: tokens of the longest rows.
        seed: of everything that is drawn.
        curriculum: None: ``length``, always.
        lm_weight: see above.
        apart: share of the rows that are in two parts for attention; the second begins within the document, before the
            first answer.
        stretch: in each batch every token of the filler stands for up to so many, how many being drawn log-uniformly.

    Raises UserError for sizes that are not positive, a curriculum that does not divide ``length``, or lengths that no
    example fits in.
    """

    def __init__(
        self,
        maker: Maker,
        tokenizer: Tokenizer,
        batch_size: int,
        length: int,
        seed: int,
        *,
        curriculum: Curriculum | None = None,
        lm_weight: float = 0.0,
        apart: float = 0.0,
        stretch: float = 1.0,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}: it must be from 0 to {2**32 - 1}.")
        if not 0 <= lm_weight <= 1:
            raise UserError(f"lm_weight is {lm_weight}: it must be from 0 to 1.")
        if not 0 <= apart <= 1:
            raise UserError(f"apart is {apart}: it must be from 0 to 1.")
        if not 1 <= stretch < math.inf:
            raise UserError(f"stretch is {stretch}: it must be at least 1.")
        self.maker, self.tokenizer = maker, tokenizer
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.curriculum = curriculum or Curriculum((length,), (1.0,), 1)
        self.lm_weight, self.apart, self.stretch = lm_weight, apart, stretch
        for each in sorted(set(self.curriculum.lengths)):
            if length % each:
                raise UserError(
                    f"A length of {each} does not divide train.length = {length}, and all steps are of as many tokens: "
                    "give lengths that divide it, or a multiple of them all as train.length."
                )
            maker.check(each)

    def fingerprint(self) -> str:
        """sha256 of what decides the examples."""
        facts = {**self.maker.facts(), "tokenizer": self.tokenizer.fingerprint()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of ``rank`` in the global batch of ``step`` (from 0), which does not depend on ``world``.

        Raises UserError when the batch does not divide among ``world`` processes.
        """
        length = self.curriculum.length(step)
        rows = self.batch_size * self.length // length
        if rows % world:
            raise UserError(f"A batch of {rows} rows does not divide among {world} processes: use a multiple of it.")
        share = rows // world
        random = np.random.RandomState(0)  # one for all rows: making one costs more than making a row
        made = []
        for row in range(rank * share, (rank + 1) * share):
            random.seed([self.seed, step, row])
            made.append(self._row(random, length))
        tokens, counts, filler, parts = (np.stack(each) for each in zip(*made, strict=True))
        targets = np.where(counts[:, 1:], tokens[:, 1:], IGNORE_INDEX)
        random.seed([self.seed, step, rows])  # the same on every rank, and of no row
        times = self.stretch ** random.random_sample()
        stretch = None if times == 1 else torch.from_numpy(np.where(filler[:, :-1], np.float32(times), np.float32(1)))
        apart = torch.from_numpy(parts[:, :-1].copy()) if self.apart else None
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), None, stretch, apart)

    def _row(self, random: np.random.RandomState, length: int) -> tuple[np.ndarray, ...]:
        """One row's tokens, int64 [length + 1], which of them are targets and which are filler, bool, and the numbers
        of its parts, int64."""
        example = self.maker.example(random, length)
        tokens = np.full(length + 1, self.tokenizer.eos_id, dtype=np.int64)
        tokens[: len(example)] = example.tokens
        counts = np.zeros(length + 1, dtype=bool)
        for begin, end in (*example.answered, (example.prompt_tokens, len(example))):
            counts[begin:end] = True
        counts[self._others(example, int(counts.sum()), random)] = True
        filler = np.zeros(length + 1, dtype=bool)
        for begin, end in example.filler:
            filler[begin:end] = True
        parts = np.zeros(length + 1, dtype=np.int64)
        if self.apart and random.random_sample() < self.apart:
            first = example.answered[0][0] if example.answered else example.document.size
            parts[random.randint(1, first) :] = 1
        return tokens, counts, filler, parts

    def _others(self, example: Example, answers: int, random: np.random.RandomState) -> Sequence[int]:
        """Places of the document's tokens that count too. (Its first was told from nothing.)"""
        wanted = self.lm_weight * answers
        number = int(wanted + random.random_sample())
        return random.randint(1, example.document.size, size=number).tolist()
