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
    return attention_reference_lse(q, k, v, window, q_documents, k_documents, scale)[0]


def attention_reference_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``sliding_attention_lse``, in one dtype."""
    length, keys, share = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    i = torch.arange(length, device=q.device)[:, None] + keys - length
    j = torch.arange(keys, device=q.device)
    allowed = j <= i if window is None else (j <= i) & (i - j < window)
    if q_documents is not None and k_documents is not None:
        allowed = allowed & (q_documents[:, None, :, None] == k_documents[:, None, None, :])
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhij,bjhk->bihk", scores.softmax(dim=-1), v), scores.logsumexp(dim=-1).transpose(1, 2)
