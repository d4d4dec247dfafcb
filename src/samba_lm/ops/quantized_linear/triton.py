"""Quantised weights on the GPU: few rows by a kernel that reads the weights as they lie, many by a kernel that writes
them out for cuBLAS."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from samba_lm.ops.quantized_linear.reference import GROUP
from samba_lm.ops.triton_math import INLINE, dot

FEW = 64
"""Rows up to which the weights are multiplied as they lie."""
WHOLE = tl.constexpr(2 * GROUP)
HALF = tl.constexpr(GROUP)
OUTPUTS = {torch.int8: 16, torch.uint8: 32}
"""Outputs of a program: few, so that a narrow weight keeps all of the GPU busy."""
INPUTS = 256
"""Inputs that a program of int8 reads at once."""
STAGES = {torch.int8: 4, torch.uint8: 5}
WARPS = 4
WRITE = (4, 1024)
"""The tile that is written out at once: outputs, inputs (of int4 always ``WHOLE`` inputs)."""


@triton.jit
def whole_bf16(x):
    """Small whole numbers in bf16, exact."""
    if INLINE:
        return x.to(tl.bfloat16)
    else:  # the interpreter holds bf16 as integers, and would take these for such
        return x.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _linear8(
    x_ptr, weight_ptr, scale_ptr, y_ptr, rows, outputs,
    K: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for begin in tl.range(0, K, INPUTS, num_stages=STAGES):
        k = begin + tl.arange(0, INPUTS)
        there = (out < outputs)[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + out[:, None].to(tl.int64) * K + k[None, :], mask=there, other=0)
        x = tl.load(x_ptr + row[None, :] * K + k[:, None], mask=(row < rows)[None, :] & (k < K)[:, None], other=0.0)
        total = dot(whole_bf16(weight), x.to(tl.bfloat16), total)
    total *= tl.load(scale_ptr + out, mask=out < outputs, other=0.0)[:, None]
    at = row[None, :] * outputs + out[:, None]
    inside = (row < rows)[None, :] & (out < outputs)[:, None]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear4(
    x_ptr, weight_ptr, scale_ptr, y_ptr, rows, outputs,
    K: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Two groups at a time: the lower halves of 64 bytes, and the upper ones. A group's sum is scaled in fp32."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, HALF)
    here = out < outputs
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    weight_ptr += out[:, None].to(tl.int64) * (GROUPS * HALF // 2) + byte[None, :]
    scale_ptr += out * GROUPS
    for pair in tl.range(0, GROUPS // 2, num_stages=STAGES):
        packed = tl.load(weight_ptr + pair * HALF, mask=here[:, None], other=0).to(tl.int16)
        low_scale = tl.load(scale_ptr + 2 * pair, mask=here, other=0.0)
        high_scale = tl.load(scale_ptr + 2 * pair + 1, mask=here, other=0.0)
        k = pair * WHOLE + byte
        at = row[None, :] * K + k[:, None]
        low_x = tl.load(x_ptr + at, mask=(row < rows)[None, :] & (k < K)[:, None], other=0.0)
        high_x = tl.load(x_ptr + at + HALF, mask=(row < rows)[None, :] & (k + HALF < K)[:, None], other=0.0)
        low = whole_bf16((packed & 15) - 8)
        high = whole_bf16((packed >> 4) - 8)
        total += dot(low, low_x.to(tl.bfloat16)) * low_scale[:, None]
        total += dot(high, high_x.to(tl.bfloat16)) * high_scale[:, None]
    at = row[None, :] * outputs + out[:, None]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=(row < rows)[None, :] & here[:, None])


@triton.jit
def _write8(weight_ptr, scale_ptr, out_ptr, outputs, K, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    there = (out < outputs)[:, None] & (k < K)[None, :]
    at = out[:, None].to(tl.int64) * K + k[None, :]
    scale = tl.load(scale_ptr + out, mask=out < outputs, other=0.0)
    weight = tl.load(weight_ptr + at, mask=there, other=0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _write4(weight_ptr, scale_ptr, out_ptr, outputs, K, groups, OUTPUTS: tl.constexpr):
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    pair, byte = tl.program_id(1), tl.arange(0, HALF)
    here = out < outputs
    packed = tl.load(
        weight_ptr + out[:, None].to(tl.int64) * (groups * (HALF // 2)) + pair * HALF + byte[None, :],
        mask=here[:, None], other=0,
    ).to(tl.int16)  # fmt: skip
    low_scale = tl.load(scale_ptr + out * groups + 2 * pair, mask=here, other=0.0)
    high_scale = tl.load(scale_ptr + out * groups + 2 * pair + 1, mask=here, other=0.0)
    low = ((packed & 15) - 8).to(tl.float32) * low_scale[:, None]
    high = ((packed >> 4) - 8).to(tl.float32) * high_scale[:, None]
    k = pair * WHOLE + byte
    at = out[:, None].to(tl.int64) * K + k[None, :]
    tl.store(out_ptr + at, low.to(out_ptr.dtype.element_ty), mask=here[:, None] & (k < K)[None, :])
    tl.store(out_ptr + at + HALF, high.to(out_ptr.dtype.element_ty), mask=here[:, None] & (k + HALF < K)[None, :])


@torch.library.custom_op("samba_lm::quantized_linear", mutates_args=())
def linear_triton(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [rows, K] -> [rows, N]. A row's bits depend on how many rows there are only through 16, 32, 64 and more."""
    rows, K = x.shape
    if rows > FEW:
        return F.linear(x, write_out(weight, scale, K, x.dtype))
    outputs = weight.shape[0]
    x, y = x.contiguous(), x.new_empty(rows, outputs)
    block = max(16, triton.next_power_of_2(rows))
    tile = OUTPUTS[weight.dtype]
    grid = triton.cdiv(outputs, tile), triton.cdiv(rows, block)
    constants = {"K": K, "ROWS": block, "OUTPUTS": tile, "STAGES": STAGES[weight.dtype]}
    with torch.cuda.device_of(x):
        if weight.dtype == torch.int8:
            _linear8[grid](
                x, weight, scale, y, rows, outputs, INPUTS=INPUTS, **constants, enable_fp_fusion=True, num_warps=WARPS
            )
        else:
            groups = scale.shape[1]
            _linear4[grid](
                x, weight, scale, y, rows, outputs, GROUPS=groups, **constants, enable_fp_fusion=True, num_warps=WARPS
            )
    return y


@linear_triton.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def write_out(weight: torch.Tensor, scale: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """``dequantize`` in one pass over memory."""
    outputs = weight.shape[0]
    out = torch.empty(outputs, width, dtype=dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        if weight.dtype == torch.int8:
            tile, inputs = WRITE
            grid = triton.cdiv(outputs, tile), triton.cdiv(width, inputs)
            _write8[grid](
                weight, scale, out, outputs, width, OUTPUTS=tile, INPUTS=inputs, enable_fp_fusion=True, num_warps=WARPS
            )
        else:
            grid = triton.cdiv(outputs, 32), scale.shape[1] // 2
            _write4[grid](
                weight, scale, out, outputs, width, scale.shape[1], OUTPUTS=32, enable_fp_fusion=True, num_warps=WARPS
            )
    return out
