"""Token cross-entropy as (sum, count), so that any split of a batch adds up to the loss of the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""Target of a token that counts neither in the sum nor in the count."""

LOGITS_BUDGET = 1 << 26
"""Logits held at once (elements; 256 MiB in fp32): 8,192 tokens of a vocabulary of 8,192, 2,097 of one of 32,000."""


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens' logits fit the budget; at least 1."""
    return max(1, LOGITS_BUDGET // vocab_size)


def token_loss_sum(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``targets`` [B, L] int64 under ``head(hidden)``, hidden [B, L, D]: (sum fp32, count int64).

    Logits are made for ``chunk`` tokens at a time and made again in backward, so that [B, L, V] is never held; up to
    ``chunk`` tokens go at once, without that second computation. Tokens whose target is ``IGNORE_INDEX`` do not count.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    count = (targets != IGNORE_INDEX).sum()
    if targets.numel() <= chunk:
        return _loss_sum(head, hidden, targets), count
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for h, t in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_loss_sum, head, h, t, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _loss_sum(head, h, t)
    return total, count


def _loss_sum(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    # fp32 logits: a bf16 log-sum-exp over a big vocabulary would lose the digits that training lives on.
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
