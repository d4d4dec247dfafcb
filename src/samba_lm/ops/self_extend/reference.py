"""SelfExtend as its definition: each score with the rotation that its distance asks for, then one softmax."""

from __future__ import annotations

import torch

from samba_lm.ops.backend import compute_dtype
from samba_lm.ops.rope import rope_angles, rotate


def self_extend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    allowed: torch.Tensor,
    *,
    group: int,
    neighbor_window: int,
    base: float,
) -> torch.Tensor:
    """Full attention with two kinds of positions, chosen by the distance i - j.

    Below ``neighbor_window`` the rotation angle is that of i - j; beyond, of floor(i/g) - floor(j/g) + n - floor(n/g).

    Args:
        q: [B, L, H, K] and k: [B, S, G, K], not rotated; v: [B, S, G, Kv].
        q_positions: int64 [B or 1, L]. k_positions: int64 [B or 1, S]. allowed: bool [B or 1, L, S].

    Returns [B, L, H, Kv] in q's dtype.
    """
    dtype, share, dim = compute_dtype(q), q.shape[2] // k.shape[2], q.shape[3]
    shift = neighbor_window - neighbor_window // group

    def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = rope_angles(positions, dim, base)
        return rotate(x.to(dtype), cos[:, :, None], sin[:, :, None])

    def scores(q_positions: torch.Tensor, k_positions: torch.Tensor) -> torch.Tensor:
        keys = turn(k, k_positions).repeat_interleave(share, dim=2)
        return torch.einsum("bihk,bjhk->bhij", turn(q, q_positions), keys) * dim**-0.5

    near = scores(q_positions, k_positions)
    far = scores(q_positions // group + shift, k_positions // group)
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    chosen = torch.where((distance < neighbor_window)[:, None], near, far)
    weights = chosen.masked_fill(~allowed[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhij,bjhk->bihk", weights, v.to(dtype).repeat_interleave(share, dim=2)).to(q.dtype)
