"""SwiGLU on the GPU with float8 products around it: activations and gradients leave the kernels as float8 numbers, and
are never written wider."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from samba_lm.ops.linear.triton_float8 import (
    E4M3,
    E5M2,
    PROGRAMS,
    ROWS,
    TINY,
    raise_largest,
    sampling,
    scale_of,
    to_float8,
)
from samba_lm.ops.triton_math import sigmoid

TILE = (64, 64)
"""Of backward: rows, columns of the gate."""
WARPS = 8


@triton.jit
def _gradients(gate, up, dact):
    """d gate, d up and the activation."""
    open_ = sigmoid(gate)
    silu = gate * open_
    return dact * up * (open_ + silu * (1.0 - open_)), dact * silu, silu * up


@triton.jit
def _rows(both_ptr, q_ptr, scale_ptr, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """q = SiLU(gate) up / scale[row] of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(both_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    act = gate * sigmoid(gate) * up
    largest = tl.maximum(tl.max(tl.abs(act)), TINY)
    tl.store(scale_ptr + row, largest / TOP)
    tl.store(q_ptr + row * WIDTH + column, to_float8(act * (TOP / largest), TOP, q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _largest(
    both_ptr, dact_ptr, weight_ptr, largest_ptr, rows, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """largest[0] = max of |d gate| and |d up|, largest[1] = the same of weight[row] times these, over some pieces."""
    most = tl.zeros((ROWS, PIECE), tl.float32)
    most_weighted = tl.zeros((ROWS, PIECE), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        weight = tl.load(weight_ptr + row, mask=row < rows, other=0.0)
        for piece in range(block % EVERY, (WIDTH + PIECE - 1) // PIECE, EVERY):
            column = piece * PIECE + tl.arange(0, PIECE)[None, :]
            inside = (row < rows) & (column < WIDTH)
            at = row.to(tl.int64) * stride + column
            gate = tl.load(both_ptr + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(both_ptr + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
            at = row.to(tl.int64) * WIDTH + column
            dact = tl.load(dact_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dgate, dup, _ = _gradients(gate, up, dact)
            larger = tl.maximum(tl.abs(dgate), tl.abs(dup))
            most = tl.maximum(most, larger)
            most_weighted = tl.maximum(most_weighted, larger * weight)
    raise_largest(largest_ptr, tl.max(most))
    raise_largest(largest_ptr + 1, tl.max(most_weighted))


@triton.jit
def _backward(
    both_ptr, dact_ptr, weight_ptr, act_scale_ptr, largest_ptr, q_ptr, qt_ptr, actt_ptr, scale_ptr,
    rows, padded, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GOAL: tl.constexpr, TOP: tl.constexpr,
    ACT_TOP: tl.constexpr,
):  # fmt: skip
    """The gradient of [gate, up] as q and, its rows times ``weight``, transposed as qt; and SiLU(gate) up / act_scale,
    transposed."""
    across: tl.constexpr = (WIDTH + COLS - 1) // COLS
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    at = row[:, None].to(tl.int64) * stride + column[None, :]
    gate = tl.load(both_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    dact = tl.load(dact_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(largest_ptr, GOAL)
    weighted_scale, weighted_inverse = scale_of(largest_ptr + 1, GOAL)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
        tl.store(scale_ptr + 1, weighted_scale)
    weight = (tl.load(weight_ptr + row, mask=row < rows, other=0.0) * weighted_inverse)[:, None]
    act_inverse = 1.0 / tl.load(act_scale_ptr + row, mask=row < rows, other=1.0)[:, None]
    dgate, dup, act = _gradients(gate, up, dact)
    at = row[:, None].to(tl.int64) * (2 * WIDTH) + column[None, :]
    tl.store(q_ptr + at, to_float8(dgate * inverse, TOP, q_ptr.dtype.element_ty), mask=inside)
    tl.store(q_ptr + at + WIDTH, to_float8(dup * inverse, TOP, q_ptr.dtype.element_ty), mask=inside)
    inside = (column[:, None] < WIDTH) & (row[None, :] < padded)
    at = column[:, None].to(tl.int64) * padded + row[None, :]
    second = tl.cast(padded, tl.int64) * WIDTH
    tl.store(qt_ptr + at, tl.trans(to_float8(dgate * weight, TOP, q_ptr.dtype.element_ty)), mask=inside)
    tl.store(qt_ptr + second + at, tl.trans(to_float8(dup * weight, TOP, q_ptr.dtype.element_ty)), mask=inside)
    tl.store(actt_ptr + at, tl.trans(to_float8(act * act_inverse, ACT_TOP, actt_ptr.dtype.element_ty)), mask=inside)


def activations(both: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU(gate) up of [M, 2 F], contiguous, as e4m3 [M, F] and scales fp32 [M]."""
    rows, width = both.shape[0], both.shape[1] // 2
    q, scale = both.new_empty(rows, width, dtype=E4M3), both.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(both):
        _rows[(rows,)](
            both, q, scale, both.stride(0), WIDTH=width, BLOCK=block, TOP=top,
            enable_fp_fusion=True, num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip
    return q, scale


def gradients(
    both: torch.Tensor,
    dact: torch.Tensor,
    weight: torch.Tensor,
    act_scale: torch.Tensor,
    padded: int,
    goal: float,
    tops: tuple[float, float],
    every: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of [gate, up] [M, 2 F] and the activation's gradient [M, F], both contiguous: the gradient as e5m2 [M, 2 F]; its
    rows times ``weight`` [M], transposed [2 F, padded]; the scales of these two, fp32 [2]; the activation over
    ``act_scale`` [M] in e4m3, transposed [F, padded]. ``tops``: the largest e5m2 and e4m3."""
    rows, width = dact.shape
    q, qt = dact.new_empty(rows, 2 * width, dtype=E5M2), dact.new_empty(2 * width, padded, dtype=E5M2)
    actt, scale = dact.new_empty(width, padded, dtype=E4M3), dact.new_empty(2, dtype=torch.float32)
    largest = dact.new_zeros(2, dtype=torch.int32)
    tile, cols = TILE
    with torch.cuda.device_of(both):
        _largest[(min(PROGRAMS, triton.cdiv(rows, ROWS)),)](
            both,
            dact,
            weight,
            largest,
            rows,
            both.stride(0),
            **sampling(width, every),
            enable_fp_fusion=True,
            num_warps=4,
        )
        _backward[(triton.cdiv(padded, tile) * triton.cdiv(width, cols),)](
            both, dact, weight, act_scale, largest, q, qt, actt, scale, rows, padded, both.stride(0),
            WIDTH=width, ROWS=tile, COLS=cols, GOAL=goal, TOP=tops[0], ACT_TOP=tops[1],
            enable_fp_fusion=True, num_warps=WARPS,
        )  # fmt: skip
    return q, qt, scale, actt
