"""The rotation, and the split of a joint projection with it, as their definitions."""

from __future__ import annotations

import torch

from samba_lm.ops.backend import compute_dtype


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (j, j + K/2) of the last dim, in fp32 at least: x [..., K]; cos, sin [..., K/2] broadcast."""
    dtype = compute_dtype(x)
    cos, sin = cos.to(dtype), sin.to(dtype)
    x1, x2 = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).to(x.dtype)


def rotate_split_reference(
    qkv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, heads: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``rotate_split``."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * groups, -1)).split((heads, groups, groups), dim=2)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v
