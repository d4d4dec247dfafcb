"""The product with a weight matrix kept in 8 or 4 bits a number: read from memory so, multiplied in the activations'
type.

Decoding reads every weight for a few rows of activations and waits for memory alone, so that fewer bytes are less time;
with many rows the weights are first written out in the activations' dtype, piece by piece, for the fastest product of
full numbers. No gradients.
"""

from __future__ import annotations

import torch

from samba_lm.errors import UserError
from samba_lm.ops.backend import Backend, choose, differentiable
from samba_lm.ops.quantized_linear.cpu import Packed, linear_cpu, pack
from samba_lm.ops.quantized_linear.reference import GROUP, WHOLE, dequantize, quantize, reference_linear
from samba_lm.ops.shapes import require

__all__ = ["GROUP", "Packed", "dequantize", "pack_for_cpu", "quantize", "quantized_linear"]

BACKENDS = ("reference", "cpu", "triton")


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    packed: Packed | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """x W^T with the W that :func:`quantize` made ``weight`` and ``scale`` of.

    Args:
        x: [..., K].
        weight: int8 [N, K], or uint8 [N, K' / 2], two numbers a byte, K' = K rounded up to 128.
        scale: fp32 [N], or [N, K' / 64].
        packed: of 4-bit weights on a CPU, what :func:`pack_for_cpu` gave; without it few rows are slower.
        backend: see ``samba_lm.ops.backend``.

    Returns:
        [..., N] in x's dtype. With few rows (32 on a CPU, 64 on a GPU) the kernels round x to bf16.

    Raises UserError where a gradient would be wanted.
    """
    K, N = x.shape[-1], weight.shape[0]
    shapes = {torch.int8: ((N, K), (N,)), torch.uint8: ((N, _whole(K) // 2), (N, _whole(K) // GROUP))}
    if weight.dtype not in shapes:
        raise UserError(f"quantized_linear: weight must be int8 or uint8 (two 4-bit numbers), not {weight.dtype}")
    expected, expected_scale = shapes[weight.dtype]
    require("quantized_linear", x.device, weight=(weight, expected), scale=(scale, expected_scale))
    if differentiable(x):
        raise UserError(
            "A quantised model cannot be trained, and gives no gradients: train the model as it was loaded, or call "
            "this one under torch.no_grad()."
        )
    chosen = choose(backend, BACKENDS, "quantized_linear", x)
    rows = x.reshape(-1, K)
    if chosen == "triton":
        from samba_lm.ops.quantized_linear.triton import linear_triton

        y = linear_triton(rows, weight, scale)
    elif chosen == "cpu":
        y = linear_cpu(rows, weight, scale, packed)
    else:
        y = reference_linear(rows, weight, scale)
    return y.view(*x.shape[:-1], N)


def pack_for_cpu(weight: torch.Tensor, scale: torch.Tensor) -> Packed | None:
    """4-bit weights once more, in the order that this CPU's kernel reads them; None where it has none for them."""
    if weight.device.type != "cpu" or weight.dtype != torch.uint8:
        return None
    return pack(weight, scale)


def _whole(width: int) -> int:
    return -(-width // WHOLE) * WHOLE
