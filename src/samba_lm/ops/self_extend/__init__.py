"""SelfExtend attention (Jin et al. 2024): near keys at their true distance, far keys at grouped positions.

Two attentions over different keys, each a common one, put together through their log-sum-exp: what a score sees of the
positions depends on which of the two its key belongs to, so that queries and keys are rotated beforehand.
"""

from __future__ import annotations

import torch

from samba_lm.ops.sliding_attention import attend_one_lse, sliding_attention_lse


def grouped_positions(positions: torch.Tensor, group: int, neighbor_window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions int64 [...] as far queries and as far keys have them: floor(i/g) + n - floor(n/g) and floor(j/g)."""
    grouped = positions // group
    return grouped + (neighbor_window - neighbor_window // group), grouped


def self_extend_attention(
    near: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    neighbor_window: int,
    positions: torch.Tensor,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention in which query i sees the keys of its document at distance < n as ``near`` has them, others as
    ``far`` has them.

    Args:
        near: q [B, L, H, K], k [B, P'+L, G, K], v [B, P'+L, G, Kv], rotated by their positions; of the past at least
            n - 1 keys, or all.
        far: the same of all P past keys, rotated by :func:`grouped_positions`.
        neighbor_window: n.
        positions: int64 [B or 1, L] of the queries in their documents.
        documents: int64 [B, P+L] of the far keys, which do not decrease along a row; the last L are the queries'. None:
            all are of one document.

    Returns [B, L, H, Kv] in q's dtype. No larger matrix of scores is made than the backends of ``sliding_attention``
    make; differentiable, on a GPU through PyTorch's operations.
    """
    q, k, v = near
    (length, keys), n = (q.shape[1], far[1].shape[1]), neighbor_window
    of_queries, of_keys = None, None
    if documents is not None:
        of_queries, of_keys = documents[:, keys - length :], documents[:, keys - k.shape[1] :]
    y, lse = sliding_attention_lse(q, k, v, window=n, q_documents=of_queries, k_documents=of_keys)
    first = max(0, n - (keys - length))  # the queries before it stand too early for a far key
    if first >= length:
        return y
    # The query at key j has the key j - n as the last it sees: as if that one were its own.
    q, k, v = far[0][:, first:], far[1][:, : keys - n], far[2][:, : keys - n]
    early = positions[:, first:] < n
    if documents is not None:
        # A document whose n-th key has not come yet has no far keys: such a query looks into the document before it,
        # so that what it finds is finite, and its weight is 0.
        of_queries, of_keys = documents[:, keys - n - q.shape[1] : keys - n], documents[:, : keys - n]
        early = early | (of_queries != documents[:, keys - q.shape[1] :])
    far_y, far_lse = sliding_attention_lse(q, k, v, window=None, q_documents=of_queries, k_documents=of_keys)
    far_lse = far_lse.masked_fill(early[:, :, None], float("-inf"))
    merged = merge(y[:, first:], lse[:, first:], far_y, far_lse)
    return torch.cat((y[:, :first], merged), dim=1) if first else merged


def self_extend_one(
    near: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    some: torch.Tensor,
) -> torch.Tensor:
    """As ``attend_one`` over two caches: each q [B, H, K], k [B, C, G, K], v [B, C, G, Kv], filled bool [B, C] or None.

    ``some`` bool [B]: whether a row has far keys; ``filled`` marks one of them even so.
    """
    y, lse = attend_one_lse(*near)
    far_y, far_lse = attend_one_lse(*far)
    return merge(y, lse, far_y, far_lse.masked_fill(~some[:, None], float("-inf")))


def merge(y: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention over two sets of keys of what it gives over each: y, other [..., K]; the log-sum-exps [...].

    ``other_lse`` may be -inf: nothing is then taken of ``other``, which must be finite. In y's dtype.
    """
    share = torch.sigmoid(other_lse - lse)[..., None]
    wide = y.to(share.dtype)
    return (wide + share * (other.to(share.dtype) - wide)).to(y.dtype)
