"""Linear cross-entropy as its definition: all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.ops.linear import linear


def loss_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Sum of token losses: hidden [N, D], weight [V, D], targets int64 [N]."""
    # fp32 logits: a bf16 log-sum-exp over a big vocabulary would lose the digits that training lives on.
    logits = linear(hidden, weight.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=ignore_index)
