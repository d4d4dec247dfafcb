"""SelfExtend attention (Jin et al. 2024): near keys at their true distance, far keys at grouped positions."""

from __future__ import annotations

import torch

from samba_lm.ops.backend import compute_dtype
from samba_lm.ops.rope import rope_angles, rotate

QUERY_BLOCK = 256  # bounds the two score matrices to [B, H, 256, S]


def self_extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    k_allowed: torch.Tensor,
    *,
    group: int,
    neighbor_window: int,
    base: float,
) -> torch.Tensor:
    """Full attention with two kinds of positions, chosen by the distance i - j.

    Below ``neighbor_window`` the rotation angle is that of i - j; beyond, of floor(i/g) - floor(j/g) + n - floor(n/g).

    Args:
        q: [B, L, H, K] and k: [B, S, G, K], not rotated; v: [B, S, G, Kv].
        q_positions: int64 [B or 1, L]. k_positions: int64 [B or 1, S]. k_allowed: bool [B or 1, L, S].

    Returns [B, L, H, Kv] in q's dtype.
    """
    dtype, share, dim = compute_dtype(q), q.shape[2] // k.shape[2], q.shape[3]
    shift = neighbor_window - neighbor_window // group

    def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = rope_angles(positions, dim, base)
        return rotate(x.to(dtype), cos[:, :, None], sin[:, :, None])

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(share, dim=2)

    k_near, k_far = spread(turn(k, k_positions)), spread(turn(k, k_positions // group))
    values, outs = spread(v.to(dtype)), []
    for start in range(0, q.shape[1], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        at = q_positions[:, rows]
        near = torch.einsum("bihk,bjhk->bhij", turn(q[:, rows], at), k_near)
        far = torch.einsum("bihk,bjhk->bhij", turn(q[:, rows], at // group + shift), k_far)
        distance = at[:, :, None] - k_positions[:, None, :]
        scores = torch.where((distance < neighbor_window)[:, None], near, far) * dim**-0.5
        weights = scores.masked_fill(~k_allowed[:, None, rows], float("-inf")).softmax(dim=-1)
        outs.append(torch.einsum("bhij,bjhk->bihk", weights, values))
    return torch.cat(outs, dim=1).to(q.dtype)
