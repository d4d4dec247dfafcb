"""From logits to the next token: penalties, temperature, top-k, top-p, min-p and a counter-based seed.

The order is fixed: penalties are applied, padded columns are cut off, the temperature divides, then top-k, top-p and
min-p remove candidates, and one uniform number u(seed, position) picks from what is left. Because u depends on nothing
but the seed and the position of the token in its own sequence, neither batching nor resuming changes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams

# How many of the likeliest tokens are sorted first for top-p; the whole vocabulary only if they hold too little mass.
NUCLEUS_GUESS = 256
# Below this temperature no two fp32 logits are close enough for the second to be drawn, and 1 / temperature overflows.
GREEDY_BELOW = 1e-30


@dataclass
class History:
    """What the penalties need to know of B sequences, in constant memory."""

    seen: Tensor
    """bool [B, V]: tokens of the prompt or the answer."""
    counts: Tensor
    """fp32 [B, V]: how often each token was generated."""

    @classmethod
    def create(cls, params: SamplingParams, batch: int, vocab_size: int, device: torch.device) -> History | None:
        """Return an empty history over the model's `vocab_size`, or None when `params` has no penalty to apply."""
        penalties = (params.repetition_penalty - 1, params.presence_penalty, params.frequency_penalty)
        if not any(penalties):
            return None
        seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)
        return cls(seen=seen, counts=torch.zeros(batch, vocab_size, device=device))

    def read(self, row: int, token_ids: Tensor) -> None:
        """Note prompt tokens, int64 [L], of one sequence."""
        self.seen[row, token_ids] = True

    def add(self, token_ids: Tensor) -> None:
        """Note one generated token, int64 [B], of every sequence."""
        column = token_ids.unsqueeze(-1)
        self.seen.scatter_(-1, column, True)
        self.counts.scatter_add_(-1, column, torch.ones_like(column, dtype=self.counts.dtype))

    def select(self, rows: list[int]) -> History:
        """Return the history of some sequences only."""
        return History(self.seen[rows], self.counts[rows])

    def fork(self) -> History:
        """Return an independent copy."""
        return History(self.seen.clone(), self.counts.clone())


def sample(
    logits: Tensor,
    params: SamplingParams,
    positions: Sequence[int],
    history: History | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Draw the next token of B sequences.

    Args:
        logits: float [B, V'], any dtype; the maths is fp32.
        positions: for each sequence, the index the drawn token will have in it.
        history: what the penalties look at, as wide as the logits; None: no penalties.
        vocab_size: columns from here on are padding and never drawn; None: all of V'.

    Returns int64 [B]. Raises UserError when the model's logits are not numbers.
    """
    logits = logits.float()
    if history is not None:
        logits = penalise(logits, params, history)
    logits = logits[:, :vocab_size]
    best, best_ids = logits.max(dim=-1)
    # One comparison catches NaN and both infinities: such logits come from weights that diverged.
    if not bool(torch.isfinite(best).all()):
        raise UserError("The model's outputs are not finite numbers: its weights are damaged or diverged in training.")
    if params.temperature < GREEDY_BELOW:
        return best_ids
    # The likeliest logit becomes 0 first, so that a tiny temperature cannot overflow.
    probs = torch.softmax((logits - best.unsqueeze(-1)) / params.temperature, dim=-1)
    probs, ids = candidates(probs, params)
    # The inverse of the cumulative distribution, in fp64: 100,000 small terms would lose too much in fp32.
    cdf = probs.double().cumsum(dim=-1)
    total = cdf[:, -1:]
    u = torch.tensor([[uniform(params.seed, position)] for position in positions], dtype=torch.float64)
    # Strictly below the total, or rounding could pick a token past the last candidate.
    target = torch.minimum(u.to(cdf.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cdf, target, right=True)
    return (index if ids is None else ids.gather(-1, index)).squeeze(-1)


def penalise(logits: Tensor, params: SamplingParams, history: History) -> Tensor:
    """Return fp32 logits [B, V] with the repetition, presence and frequency penalties applied, in that order."""
    if params.repetition_penalty != 1:
        weaker = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(history.seen, weaker, logits)
    if params.presence_penalty or params.frequency_penalty:
        logits = logits - params.presence_penalty * (history.counts > 0) - params.frequency_penalty * history.counts
    return logits


def candidates(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Zero the probabilities that top-k, top-p and min-p remove.

    Args:
        probs: fp32 [B, V], each row summing to 1.

    Returns the (not renormalised) probabilities [B, K] and their token ids [B, K], likeliest first; or [B, V] in the
    order of the vocabulary and None for the ids, where no sorting was needed. At the edge of top-k, ties are broken
    arbitrarily, but exactly k tokens stay.
    """
    vocab_size = probs.shape[-1]
    ids = None
    if params.top_k is not None and params.top_k < vocab_size:
        probs, ids = probs.topk(params.top_k, dim=-1)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    elif params.top_p < 1:
        # Sorting a few of the likeliest is 40 times cheaper than sorting a vocabulary of 50,000.
        probs_, ids = probs.topk(min(NUCLEUS_GUESS, vocab_size), dim=-1)
        if ids.shape[-1] < vocab_size and bool((probs_.sum(dim=-1) < params.top_p).any()):
            probs_, ids = probs.sort(dim=-1, descending=True)
        probs = probs_
    peak = probs.amax(dim=-1, keepdim=True)
    if params.top_p < 1:
        likelier = probs.cumsum(dim=-1) - probs
        # The likeliest always stays: as an fp32 number, a tiny top-p is 0.
        probs = probs.masked_fill((likelier >= params.top_p) & (likelier > 0), 0.0)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * peak, 0.0)
    return probs, ids


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that belongs to this seed and position (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())
