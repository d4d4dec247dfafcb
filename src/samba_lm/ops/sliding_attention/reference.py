"""Windowed causal attention as its definition: the whole score matrix, masked, in fp32 at least."""

from __future__ import annotations

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Arguments as in ``sliding_attention``, in one dtype."""
    length, keys, share = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    i = torch.arange(length, device=q.device)[:, None] + keys - length
    j = torch.arange(keys, device=q.device)
    allowed = j <= i if window is None else (j <= i) & (i - j < window)
    if q_documents is not None and k_documents is not None:
        allowed = allowed & (q_documents[:, None, :, None] == k_documents[:, None, None, :])
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhij,bjhk->bihk", weights, v)
