"""Quantised weights on a CPU: PyTorch's own kernels for few rows, products of full numbers for many.

On 2 cores of an AMD EPYC (AVX-512), a weight 4096 x 1536 with 4 rows: fp32 2.3 ms, bf16 1.2, int8 0.55, int4 0.15
(docs/quantize.md). The kernels are fast in bf16 alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from samba_lm.ops.linear import linear
from samba_lm.ops.quantized_linear.reference import GROUP, dequantize, unpack

FEW = 32
"""Rows up to which these kernels are faster than making full numbers first."""
PIECE = 512
"""Outputs whose weights are made at once: they stay in the cache."""
INPUTS = 32
"""PyTorch's int8 kernel reads vectors of 8 or 16 inputs and does not look where a row ends: rows that do not end there
are not for it."""
OUTPUTS = 16
"""What PyTorch's int4 kernel wants the number of outputs to be a multiple of."""


BLOCK = 256
"""Outputs that are packed at once, in the cache; a multiple of the 64 (AVX-512) or 32 whose numbers are interleaved."""


class Packed(NamedTuple):
    """4-bit weights as PyTorch's kernel for this processor reads them."""

    weight: torch.Tensor
    """uint8 [N, K' / 2], in the processor's own order."""
    scale: torch.Tensor
    """bf16 [K' / 64, N, 2]: the scales, and beside each the zero point, which is none."""


def linear_cpu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, packed: Packed | None) -> torch.Tensor:
    """x [rows, K] -> [rows, N]."""
    few = x.shape[0] <= FEW and x.device.type == "cpu" and x.dtype != torch.float64
    if few and weight.dtype == torch.int8 and x.shape[1] % INPUTS == 0:
        return torch._weight_int8pack_mm(x.bfloat16().contiguous(), weight, scale.bfloat16()).to(x.dtype)
    if few and packed is not None:
        width = scale.shape[1] * GROUP
        wide = F.pad(x, (0, width - x.shape[1])).bfloat16().contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(wide, packed.weight, GROUP, packed.scale).to(x.dtype)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for begin in range(0, weight.shape[0], PIECE):
        part = slice(begin, begin + PIECE)
        y[:, part] = linear(x, dequantize(weight[part], scale[part], x.shape[1], x.dtype))
    return y


def pack(weight: torch.Tensor, scale: torch.Tensor) -> Packed | None:
    """See ``pack_for_cpu``."""
    if weight.shape[0] % OUTPUTS:
        return None
    wide = (unpack(piece).to(torch.int32) + 8 for piece in weight.split(BLOCK))
    scales = scale.t().bfloat16()
    return Packed(
        torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(piece, 1) for piece in wide]),
        torch.stack((scales, torch.zeros_like(scales)), dim=-1),
    )
