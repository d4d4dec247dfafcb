"""Attention of one query a sequence: the keys are cut into splits, run side by side; a second kernel joins them.

The query heads that share a key head go through the tensor cores together. The cut follows from the shapes alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from samba_lm.ops.shapes import last_dense
from samba_lm.ops.sliding_attention.triton_forward import HIDDEN
from samba_lm.ops.triton_math import dot, exp2

PROGRAMS = 512
"""Splits are made until there are about so many programs: four for each processor of an H100."""
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["slots", "chunk"])
def split_kernel(
    q,
    k,
    v,
    filled,
    parts,
    tops,
    totals,
    slots,
    chunk,
    scale,
    q_batch,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    filled_batch,
    filled_row,
    SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FILLED: tl.constexpr,
):
    """parts fp32 [B, H, splits, DIM] unnormalised, tops and totals fp32 [B, H, splits]. Grid: (splits, G, B)."""
    split, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, HEADS)
    dim = tl.arange(0, WIDTH)
    column = tl.arange(0, BLOCK)
    head = group * SHARE + row
    mask = (row < SHARE)[:, None] & (dim < DIM)[None, :]
    queries = tl.load(q + batch * q_batch + head[:, None] * q_head + dim[None, :], mask=mask, other=0.0)
    acc = tl.zeros((HEADS, WIDTH), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    top = tl.full((HEADS,), HIDDEN, tl.float32)
    start = split * chunk
    for at in tl.range(start, tl.minimum(start + chunk, slots), BLOCK):
        j = at + column
        visible = j < slots
        if FILLED:
            visible = tl.load(filled + batch * filled_batch + j * filled_row, mask=visible, other=0) != 0
        inside = visible[:, None] & (dim < DIM)[None, :]
        j_wide = j.to(tl.int64)[:, None]
        k_at = k + (batch * k_batch + group * k_head) + j_wide * k_row + dim[None, :]
        v_at = v + (batch * v_batch + group * v_head) + j_wide * v_row + dim[None, :]
        keys = tl.load(k_at, mask=inside, other=0.0)
        values = tl.load(v_at, mask=inside, other=0.0)
        scores = tl.where(visible[None, :], dot(queries, tl.trans(keys)) * scale, HIDDEN)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = exp2(scores - higher[:, None])
        fade = exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        acc = dot(weights.to(values.dtype), values, acc * fade[:, None])
        top = higher
    splits = tl.num_programs(0)
    at = (batch * tl.num_programs(1) * SHARE + head) * splits + split
    tl.store(tops + at, top, mask=row < SHARE)
    tl.store(totals + at, total, mask=row < SHARE)
    tl.store(parts + at[:, None] * DIM + dim[None, :], acc, mask=mask)


@triton.jit
def join_kernel(parts, tops, totals, out, lse, splits, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """out [B, H, DIM], lse fp32 [B, H]. Grid: B x H."""
    at = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    there = split < splits
    top = tl.load(tops + at * splits + split, mask=there, other=HIDDEN)
    # A split that saw no key has HIDDEN as its top, and so no weight.
    highest = tl.max(top, 0)
    weight = tl.where(there, exp2(top - highest), 0.0)
    total = tl.sum(weight * tl.load(totals + at * splits + split, mask=there, other=0.0), 0)
    mask = there[:, None] & (dim < DIM)[None, :]
    part = tl.load(parts + (at * splits + split)[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    y = tl.sum(part * weight[:, None], 0) / total
    tl.store(out + at * DIM + dim, y.to(out.dtype.element_ty), mask=dim < DIM)
    tl.store(lse + at, (highest + tl.log2(total)) * LN_2)


def cut(slots: int, programs: int, width: int, block: int) -> tuple[int, int]:
    """(splits, keys in each) for a cache of ``slots``, where ``programs`` run side by side without splits."""
    most = min(128, 16384 // width, triton.cdiv(slots, block))
    splits = max(1, min(most, triton.cdiv(PROGRAMS, programs)))
    chunk = triton.cdiv(triton.cdiv(slots, splits), block) * block
    return triton.cdiv(slots, chunk), chunk


@torch.library.custom_op("samba_lm::attend_one", mutates_args=())
def attend_one_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, filled: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``attend_one_lse``; at least one slot of a row must be filled. Has no gradient."""
    q, k, v = (last_dense(x) for x in (q, k, v))
    batch, heads, dim = q.shape
    slots, groups = k.shape[1], k.shape[2]
    width = max(16, triton.next_power_of_2(dim))
    block = 64 if width <= 128 and q.dtype != torch.float32 else 32
    splits, chunk = cut(slots, batch * groups, width, block)
    parts = q.new_empty((batch, heads, splits, dim), dtype=torch.float32)
    tops, totals = (q.new_empty((batch, heads, splits), dtype=torch.float32) for _ in range(2))
    out, lse = q.new_empty(q.shape), q.new_empty((batch, heads), dtype=torch.float32)
    share = heads // groups
    with torch.cuda.device_of(q):
        split_kernel[(splits, groups, batch)](
            q,
            k,
            v,
            filled,
            parts,
            tops,
            totals,
            slots,
            chunk,
            scale * LOG2_E,
            *q.stride()[:2],
            *k.stride()[:3],
            *v.stride()[:3],
            *((0, 0) if filled is None else filled.stride()),
            SHARE=share,
            HEADS=max(16, triton.next_power_of_2(share)),
            DIM=dim,
            WIDTH=width,
            BLOCK=block,
            FILLED=filled is not None,
            enable_fp_fusion=True,
            num_warps=4,
            num_stages=3,
        )
        join_kernel[(batch * heads,)](
            parts,
            tops,
            totals,
            out,
            lse,
            splits,
            DIM=dim,
            WIDTH=width,
            SPLITS=triton.next_power_of_2(splits),
            enable_fp_fusion=True,
            num_warps=4,
        )
    return out, lse


@attend_one_triton.register_fake
def _(q, k, v, filled, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
