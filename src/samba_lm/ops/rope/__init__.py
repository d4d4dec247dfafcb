"""Rotary position embedding, exact at any distance: integer positions, fp64 angles, no table."""

from __future__ import annotations

import torch

from samba_lm.errors import UserError
from samba_lm.ops.backend import Backend, choose
from samba_lm.ops.rope.reference import rotate, rotate_split_reference
from samba_lm.ops.shapes import require, require_rank

__all__ = ["rope_angles", "rotate", "rotate_split"]

BACKENDS = ("reference", "triton")


def rope_angles(positions: torch.Tensor, dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base^(-2j/dim), j = 0..dim/2-1: int64 [...] -> two fp64 [..., dim/2].

    The product is taken in fp64: in fp32 relative angles are off by 0.03 rad at one million tokens and 0.9 at ten.
    """
    frequency = base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / -dim)
    angle = positions[..., None].to(torch.float64) * frequency
    return angle.cos(), angle.sin()


def rotate_split(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    groups: int,
    *,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a joint projection into queries, keys and values, and rotate the first two as :func:`rotate` does.

    Args:
        qkv: [B, L, (H + 2 G) K], the queries' heads first, then the keys', then the values'; K even if rotated.
        cos, sin: [B or 1, L, 1, K/2] of :func:`rope_angles`, in fp32 or fp64; None: split only.
        heads: H. groups: G.
        backend: see ``samba_lm.ops.backend``.

    Returns:
        q [B, L, H, K], k and v [B, L, G, K] in qkv's dtype: contiguous from the GPU's kernels, which read and write
        everything once; views of qkv where nothing is rotated in PyTorch. Differentiable in qkv.
    """
    require_rank("rotate_split", "qkv", qkv, "B, L, (H + 2 G) K")
    (batch, length, columns), count = qkv.shape, heads + 2 * groups
    width = columns // count
    if columns % count or (cos is not None and width % 2):
        even = "" if cos is None else " of an even width"
        raise UserError(f"rotate_split: {heads} + 2 * {groups} heads{even} do not fill {columns} columns")
    if (cos is None) != (sin is None):
        raise UserError("rotate_split: give cos and sin, or neither")
    rows = 1 if cos is not None and cos.shape[:1] == (1,) else batch
    angles = (rows, length, 1, width // 2)
    require("rotate_split", qkv.device, cos=(cos, angles), sin=(sin, angles))
    # The kernels work on pairs of columns.
    if choose(backend, BACKENDS, "rotate_split", qkv) == "reference" or width % 2:
        return rotate_split_reference(qkv, cos, sin, heads, groups)
    from samba_lm.ops.rope.triton import rotate_split_triton

    return rotate_split_triton(qkv, cos, sin, heads, groups)
