"""Gated linear attention as its definition: a loop over time."""

from __future__ import annotations

import torch


def gla_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    documents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t;  o_t = q_t S_t. Shapes as in ``gated_linear_attention``."""
    outs = []
    for t in range(q.shape[1]):
        if documents is not None:
            before = documents[:, t - 1] if t else torch.zeros_like(documents[:, 0])
            state = state.masked_fill((documents[:, t] != before)[:, None, None, None], 0.0)
        state = log_decay[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outs, dim=1), state
