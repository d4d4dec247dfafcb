"""Linear cross-entropy in chunks of tokens, whose logits are made again in backward: any device, no compiler."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from samba_lm.ops.linear_cross_entropy.reference import loss_sum

LOGITS_BUDGET = 1 << 26
"""Logits held at once (elements; 256 MiB in fp32): 8,192 tokens of a vocabulary of 8,192, 2,097 of one of 32,000."""


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens' logits fit the budget; at least 1."""
    return max(1, LOGITS_BUDGET // vocab_size)


def chunked_loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """As ``reference.loss_sum``. What fits one chunk goes at once, without the second computation."""
    chunk = chunk_tokens(weight.shape[0])
    if targets.numel() <= chunk:
        return loss_sum(hidden, weight, targets, ignore_index)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(loss_sum, h, weight, t, ignore_index, use_reentrant=False, preserve_rng_state=False)
            total = total + part
        else:
            total = total + loss_sum(h, weight, t, ignore_index)
    return total
