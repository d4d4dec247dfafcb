"""From logits to the next token: penalties, temperature, top-k, top-p, min-p and a counter-based seed.

The order is fixed: penalties are applied, padded columns are cut off, the temperature divides, then top-k, top-p and
min-p remove candidates, and one uniform number u(seed, position) picks from what is left. Each sequence has options of
its own. Because u depends on nothing but the seed and the position of the token in its own sequence, and a row is
computed without a look at the others, neither batching nor resuming changes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.ops import draw as drawing
from samba_lm.ops.draw import GREEDY_BELOW, Rules

NOT_FINITE = drawing.NOT_FINITE
"""What :func:`sample` gives instead of a token where the logits are no numbers."""


@dataclass
class Options:
    """What each of B sequences asks of the sampler: tensors [B] beside the logits, and what is known of all of them.

    The tensors are fp32, but ``top_k`` (the vocabulary's size: all) and ``seed`` (64 bits), which are int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    seed: Tensor
    greedy: bool
    """All of them take the likeliest token."""
    cut: bool
    """Somebody asks for top-k, top-p or min-p."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device | str = "cpu") -> Options:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(device)

        top_k = [vocab_size if p.top_k is None else min(p.top_k, vocab_size) for p in params]
        return cls(
            column([p.temperature for p in params]),
            torch.tensor(top_k).to(device),
            column([p.top_p for p in params]),
            column([p.min_p for p in params]),
            column([p.repetition_penalty for p in params]),
            column([p.presence_penalty for p in params]),
            column([p.frequency_penalty for p in params]),
            torch.tensor([p.seed - (p.seed >> 63 << 64) for p in params]).to(device),
            greedy=all(p.temperature < GREEDY_BELOW for p in params),
            cut=min(top_k, default=vocab_size) < vocab_size or any(p.top_p < 1 or p.min_p > 0 for p in params),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Those that have one number for each sequence."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def rows(self, which: slice) -> Options:
        """Those of some sequences, as views."""
        views: dict[str, Any] = {name: tensor[which] for name, tensor in self.tensors().items()}
        return replace(self, **views)


def bias_of(params: SamplingParams, vocab_size: int) -> Tensor | None:
    """The bias fp32 [vocab_size] that one sequence asks for, on the CPU. Raises UserError for an id beyond."""
    if not params.logit_bias:
        return None
    bias = torch.zeros(vocab_size)
    for token_id, value in params.logit_bias:
        if token_id >= vocab_size:
            raise UserError(
                f"logit_bias names token {token_id}, but the tokenizer has {vocab_size}: give ids below that."
            )
        bias[token_id] = value
    return bias


def penalised(params: SamplingParams) -> bool:
    """Whether a sequence with these options needs a history."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


@dataclass
class History:
    """What the penalties need to know of B sequences, in constant memory."""

    seen: Tensor
    """bool [B, V]: tokens of the prompt or the answer."""
    counts: Tensor
    """fp32 [B, V]: how often each token was generated."""

    @classmethod
    def create(cls, batch: int, vocab_size: int, device: torch.device | str) -> History:
        """An empty history over the model's `vocab_size`."""
        seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)
        return cls(seen=seen, counts=torch.zeros(batch, vocab_size, device=device))

    def read(self, row: int, token_ids: Tensor) -> None:
        """Note prompt tokens, int64 [L], of one sequence."""
        self.seen[row, token_ids] = True

    def add(self, token_ids: Tensor, made: Tensor | None = None) -> None:
        """Note one token, int64 [B], of every sequence; ``made``: [B], 0 where it is the prompt's, else 1; None: 1."""
        column = token_ids.unsqueeze(-1)
        ones = torch.ones_like(token_ids) if made is None else made
        self.seen.scatter_(-1, column, True)
        self.counts.scatter_add_(-1, column, ones.to(self.counts.dtype).unsqueeze(-1))

    def select(self, rows: list[int]) -> History:
        """A copy of some sequences only."""
        return History(self.seen[rows], self.counts[rows])

    def fork(self) -> History:
        """Return an independent copy."""
        return History(self.seen.clone(), self.counts.clone())


def sample(
    logits: Tensor,
    options: Options,
    positions: Tensor,
    history: History | None = None,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Draw the next token of B sequences.

    Args:
        logits: float [B, V'], any dtype; the maths is fp32.
        positions: int64 [B], the index the drawn token will have in its sequence.
        history: what the penalties look at, as wide as the logits; None: no penalties.
        vocab_size: columns from here on are padding and never drawn; None: all of V'.
        bias: fp32 [B or 1, vocab_size], added after the penalties; -inf rules a token out.

    Returns int64 [B], NOT_FINITE where the largest logit is no finite number. On a GPU nothing is waited for.
    """
    logits = logits.float()
    if history is not None:
        logits = penalise(logits, options, history)
    logits = logits[:, :vocab_size]
    if bias is not None:
        logits = logits + bias
    best, ids = logits.max(dim=-1)
    if options.greedy:
        # One comparison catches NaN and both infinities: such logits come from weights that diverged.
        return torch.where(torch.isfinite(best), ids, NOT_FINITE)
    rules = Rules(options.temperature, options.top_k, options.top_p, options.min_p)
    return drawing.draw(logits, best, ids, rules, options.seed, positions, cut=options.cut)


class DamagedModelError(UserError):
    """The model's outputs are no numbers."""


def require_finite(token_ids: Sequence[int]) -> None:
    """Raise DamagedModelError where :func:`sample` found no token."""
    if NOT_FINITE in token_ids:
        raise DamagedModelError(
            "The model's outputs are not finite numbers: its weights are damaged or diverged in training."
        )


def penalise(logits: Tensor, options: Options, history: History) -> Tensor:
    """fp32 logits [B, V] with the repetition, presence and frequency penalties applied, in that order."""
    repetition, presence, frequency = (t[:, None] for t in (options.repetition, options.presence, options.frequency))
    weaker = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(history.seen, weaker, logits)
    return logits - presence * (history.counts > 0) - frequency * history.counts
