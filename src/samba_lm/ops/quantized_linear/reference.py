"""What the numbers of a quantised weight mean; the definition of the product."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Kind = Literal["int8", "int4"]
GROUP = 64
"""Inputs that share a scale in int4."""
WHOLE = 2 * GROUP
"""Inputs whose 4-bit numbers lie together: byte j of 64 holds the numbers of inputs j (lower half) and j + 64."""
PIECE = 1 << 19
"""Numbers that are quantised at once: on a CPU they stay in the cache."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Of int4: how much of a group's largest number its scale may cover; the least squared error is taken."""


def quantize(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] in any floating-point dtype as whole numbers and fp32 scales, symmetric around zero.

    int8: [N, K] from -127 to 127 and a scale a row, [N]. int4: from -8 to 7, a scale for every 64 inputs [N, K' / 64],
    two numbers a byte, uint8 [N, K' / 2], K filled up to K', a multiple of 128, with zeros. Scales are numbers that
    bf16 holds, so that kernels which take them in bf16 mean the same weight.
    """
    rows = max(1, PIECE // max(1, weight.shape[1]))
    made = [_quantize_rows(piece.detach().float(), kind) for piece in weight.split(rows)]
    return torch.cat([numbers for numbers, _ in made]), torch.cat([scale for _, scale in made])


def _quantize_rows(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "int8":
        scale = _scale(weight.abs().amax(1) / 127)
        numbers = (weight / scale[:, None]).round_().clamp_(-127, 127)
        return numbers.to(torch.int8), scale
    N = weight.shape[0]
    groups = F.pad(weight, (0, -weight.shape[1] % WHOLE)).view(N, -1, GROUP)
    scale = _best_scale(groups)
    numbers = ((groups / scale[..., None]).round_().clamp_(-8, 7) + 8).to(torch.uint8).view(N, -1, 2, GROUP)
    return (numbers[:, :, 0] | numbers[:, :, 1] << 4).view(N, -1), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, width] that the numbers of :func:`quantize` stand for, rounded to ``dtype``."""
    if weight.dtype == torch.int8:
        return weight * scale.to(dtype)[:, None]
    numbers = unpack(weight).view(weight.shape[0], -1, GROUP)
    return (numbers * scale.to(dtype)[..., None]).view(weight.shape[0], -1)[:, :width]


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K' / 2] -> int8 [N, K'] from -8 to 7."""
    pairs = weight.view(weight.shape[0], -1, GROUP)
    return torch.stack((pairs & 15, pairs >> 4), dim=2).view(weight.shape[0], -1).to(torch.int8).sub_(8)


def reference_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [rows, K] -> [rows, N]."""
    return F.linear(x, dequantize(weight, scale, x.shape[1], x.dtype))


def _scale(wanted: torch.Tensor) -> torch.Tensor:
    """fp32 of 8 significant bits; 1 where all is zero, and NaN where something is not finite."""
    scale = wanted.bfloat16().float()
    return torch.where(scale == 0, 1.0, scale)


def _best_scale(groups: torch.Tensor) -> torch.Tensor:
    """[N, groups, GROUP] -> [N, groups]: a few are tried, because one large number makes all others coarse."""
    whole = groups.abs().amax(-1) / 7.5
    best = least = None
    for part in SHRINK:
        scale = _scale(whole * part)
        wide = scale[..., None]
        error = ((groups / wide).round_().clamp_(-8, 7) * wide).sub_(groups).square_().sum(-1)
        if best is None or least is None:
            best, least = scale, error
        else:
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert best is not None
    return best
