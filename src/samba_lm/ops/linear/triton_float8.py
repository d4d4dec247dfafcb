"""Casts to float8 on the GPU: each gives a tensor and its transpose, because float8 products read both operands along
the dimension that is summed over.

A tensor is read once, not counting what is needed for its scale: rows scaled by their own largest value are read twice
from the cache, weights are looked through before, and of gradients one piece in ``EVERY`` is.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from samba_lm.ops.triton_math import INLINE

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = tl.constexpr(1e-30)
"""The least that counts as a largest value, so that zeros have a scale too."""
ROWS, PIECE = 32, 128
"""The tile in which a tensor is looked through: rows, columns."""
PROGRAMS = 1024
CAST = (64, 128)
"""The tile that is cast and transposed: rows, columns."""
CAST_WARPS = 8
ROW_TILE = (32, 512)
"""The same where rows have scales of their own."""
ROW_WARPS = 8


@triton.jit
def to_float8(x, TOP: tl.constexpr, dtype: tl.constexpr):
    """fp32 to float8, rounded to nearest; beyond ``TOP`` it stays there, and what is infinite becomes NaN. The GPU's
    instruction does the first two."""
    if not INLINE:  # the interpreter's cast does neither: it drops what rounding carries into the exponent
        x = tl.minimum(tl.maximum(x, -TOP), TOP)
        dropped: tl.constexpr = 20 if TOP == 448.0 else 21  # of 23 bits
        bits = x.to(tl.int32, bitcast=True)
        bits += (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        x = ((bits >> dropped) << dropped).to(tl.float32, bitcast=True)
        q = x.to(dtype)
    else:
        x += x * 0.0
        # Four at once into one register. Where two and two lie in registers of 16 bits, as x.to(dtype) has them, ptxas
        # (12.8) reads one before it is written: every fourth number of what is transposed was then another.
        e4m3: tl.constexpr = "cvt.rn.satfinite.e4m3x2.f32"
        e5m2: tl.constexpr = "cvt.rn.satfinite.e5m2x2.f32"
        instruction: tl.constexpr = e4m3 if TOP == 448.0 else e5m2
        q = tl.inline_asm_elementwise(
            "{.reg .b16 a, b; " + instruction + " a, $2, $1; " + instruction + " b, $4, $3; mov.b32 $0, {a, b};}",
            "=r,r,r,r,r",
            [x],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        ).to(dtype, bitcast=True)
    return q


@triton.jit
def raise_largest(largest_ptr, value):
    """largest = max(largest, value), value >= 0 and fp32: as integers these numbers are in the same order."""
    tl.atomic_max(largest_ptr, value.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def scale_of(largest_ptr, GOAL: tl.constexpr):
    """The scale that takes the largest value to ``GOAL``, and its inverse."""
    largest = tl.maximum(tl.load(largest_ptr).to(tl.float32, bitcast=True), TINY)
    return largest / GOAL, GOAL / largest


@triton.jit
def _largest(
    x_ptr, weight_ptr, largest_ptr, rows, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, EVERY: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """largest[0] = max |x|, largest[1] = max weight[row] |x|, over every EVERY-th piece, others in each tile row."""
    most = tl.zeros((ROWS, PIECE), tl.float32)
    most_weighted = tl.zeros((ROWS, PIECE), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        weight = tl.load(weight_ptr + row, mask=row < rows, other=0.0) if WEIGHTED else 1.0
        for piece in range(block % EVERY, (WIDTH + PIECE - 1) // PIECE, EVERY):
            column = piece * PIECE + tl.arange(0, PIECE)[None, :]
            at = row.to(tl.int64) * stride + column
            x = tl.abs(tl.load(x_ptr + at, mask=(row < rows) & (column < WIDTH), other=0.0).to(tl.float32))
            most = tl.maximum(most, x)
            if WEIGHTED:
                most_weighted = tl.maximum(most_weighted, x * weight)
    raise_largest(largest_ptr, tl.max(most))
    if WEIGHTED:
        raise_largest(largest_ptr + 1, tl.max(most_weighted))


@triton.jit
def _cast(
    x_ptr, weight_ptr, largest_ptr, q_ptr, qt_ptr, scale_ptr, rows, padded, stride, q_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GOAL: tl.constexpr, TOP: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """q = x / scale and qt = its transpose; WEIGHTED: qt = (weight[row] x)^T / another scale. scale: see ``cast``."""
    across: tl.constexpr = (WIDTH + COLS - 1) // COLS
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    at = row[:, None].to(tl.int64) * stride + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(largest_ptr, GOAL)
    q = to_float8(x * inverse, TOP, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row[:, None].to(tl.int64) * q_stride + column[None, :], q, mask=inside)
    if WEIGHTED:
        weighted_scale, inverse = scale_of(largest_ptr + 1, GOAL)
        weight = tl.load(weight_ptr + row, mask=row < rows, other=0.0)
        q = to_float8(x * (weight * inverse)[:, None], TOP, q_ptr.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
            tl.store(scale_ptr + 1, weighted_scale)
    else:
        if tl.program_id(0) % across == 0:
            tl.store(scale_ptr + row, tl.zeros((ROWS,), tl.float32) + scale, mask=row < rows)
    at = column[:, None].to(tl.int64) * padded + row[None, :]
    tl.store(qt_ptr + at, tl.trans(q), mask=(column[:, None] < WIDTH) & (row[None, :] < padded))


@triton.jit
def _cast_rows(
    x_ptr, q_ptr, qt_ptr, scale_ptr, rows, padded, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """q = x / scale[row] and its transpose, every row to its own largest value."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    most = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, WIDTH, COLS):
        column = start + tl.arange(0, COLS)
        at = row[:, None].to(tl.int64) * stride + column[None, :]
        x = tl.load(x_ptr + at, mask=(row[:, None] < rows) & (column[None, :] < WIDTH), other=0.0)
        most = tl.maximum(most, tl.abs(x.to(tl.float32)))
    largest = tl.maximum(tl.max(most, axis=1), TINY)
    tl.store(scale_ptr + row, largest / TOP, mask=row < rows)
    inverse = (TOP / largest)[:, None]
    for start in range(0, WIDTH, COLS):
        column = start + tl.arange(0, COLS)
        inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
        at = row[:, None].to(tl.int64)
        x = tl.load(x_ptr + at * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        q = to_float8(x * inverse, TOP, q_ptr.dtype.element_ty)
        tl.store(q_ptr + at * WIDTH + column[None, :], q, mask=inside)
        at = column[:, None].to(tl.int64) * padded + row[None, :]
        tl.store(qt_ptr + at, tl.trans(q), mask=(column[:, None] < WIDTH) & (row[None, :] < padded))


def readable(x: torch.Tensor) -> torch.Tensor:
    """x itself where its rows are contiguous, wherever they lie."""
    return x if x.stride(1) == 1 else x.contiguous()


def sampling(width: int, every: int) -> dict[str, int]:
    """The constants of a pass that looks at one piece in ``every``, and at some of every tile row."""
    return {"WIDTH": width, "ROWS": ROWS, "PIECE": PIECE, "EVERY": min(every, triton.cdiv(width, PIECE))}


def cast_rows(x: torch.Tensor, padded: int, top: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] as e4m3, the transpose [K, padded], and scales fp32 [M]."""
    (rows, width), x = x.shape, readable(x)
    q, qt = x.new_empty(rows, width, dtype=E4M3), x.new_empty(width, padded, dtype=E4M3)
    scale = x.new_empty(rows, dtype=torch.float32)
    tile, cols = ROW_TILE
    with torch.cuda.device_of(x):
        _cast_rows[(triton.cdiv(padded, tile),)](
            x, q, qt, scale, rows, padded, x.stride(0), WIDTH=width, ROWS=tile, COLS=cols, TOP=top,
            enable_fp_fusion=True, num_warps=ROW_WARPS,
        )  # fmt: skip
    return q, qt, scale


def cast(
    parts: list[torch.Tensor],
    weight: torch.Tensor | None,
    padded: int,
    dtype: torch.dtype,
    goal: float,
    top: float,
    every: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts [M, N_i] side by side as ``dtype`` [M, N], the largest of them at ``goal``; transposed [N, padded];
    fp32 scales: of each row [M], all equal; with ``weight`` [M], by which the transpose is multiplied first, the scale
    of the tensor and that of the transpose, [2]."""
    rows, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    first = parts[0]
    q, qt = first.new_empty(rows, width, dtype=dtype), first.new_empty(width, padded, dtype=dtype)
    scale = first.new_empty(rows if weight is None else 2, dtype=torch.float32)
    largest = first.new_zeros(2, dtype=torch.int32)
    parts = [readable(part) for part in parts]
    weighted = weight is not None
    tile, cols = CAST
    with torch.cuda.device_of(first):
        for part in parts:
            constants = sampling(part.shape[1], every)
            _largest[(min(PROGRAMS, triton.cdiv(rows, ROWS)),)](
                part,
                weight,
                largest,
                rows,
                part.stride(0),
                **constants,
                WEIGHTED=weighted,
                enable_fp_fusion=True,
                num_warps=4,
            )
        begin = 0
        for part in parts:
            n = part.shape[1]
            _cast[(triton.cdiv(padded, tile) * triton.cdiv(n, cols),)](
                part, weight, largest, q[:, begin:], qt[begin:], scale, rows, padded, part.stride(0), width,
                WIDTH=n, ROWS=tile, COLS=cols, GOAL=goal, TOP=top, WEIGHTED=weighted,
                enable_fp_fusion=True, num_warps=CAST_WARPS,
            )  # fmt: skip
            begin += n
    return q, qt, scale
