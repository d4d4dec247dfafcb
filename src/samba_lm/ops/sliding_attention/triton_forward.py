"""Windowed attention's forward kernel: one block of queries of one head against its keys, softmax on line.

Query i stands at key P + i and sees the keys first[i] <= j <= P + i, where first[i] never falls along a row: a window
gives P + i - window + 1, documents give more. Key blocks are counted from the block's first query: those that only
some of the block's queries see are visited first, with masks, then those that all of them see, without any.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from samba_lm.ops.triton_math import dot, exp2, log2

HIDDEN = tl.constexpr(-1e30)
"""The score of an unseen key. Finite: a row that sees nothing yet gathers numbers that its first real key wipes out."""


@triton.jit
def load_rows(
    x,
    batch,
    head,
    row,
    rows,
    stride_batch,
    stride_row,
    stride_head,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows row .. row + BLOCK of one head as [BLOCK, WIDTH]; outside 0 <= row < rows (if MASKED) and DIM: zeros.

    ``x`` is a tensor descriptor of [B, heads, rows, DIM] if TMA, else the pointer of [B, rows, heads, DIM].
    """
    if TMA:
        return x.load([batch, head, row, 0]).reshape(BLOCK, WIDTH)
    else:
        x += batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + row.to(tl.int64) * stride_row
        r, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
        at = x + (r * stride_row + column)
        if MASKED:
            inside = (row + r >= 0) & (row + r < rows)
            if DIM < WIDTH:
                inside = inside & (column < DIM)
            return tl.load(at, mask=inside, other=0.0)
        elif DIM < WIDTH:
            return tl.load(at, mask=column < DIM, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def first_key(first, batch, i, length, past, window, FIRST: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that query i (a number or a block of them) sees; queries past the end see what the last one does.

    ``first``: int32 [B, L] if FIRST. Else the window alone decides, if WINDOW.
    """
    if FIRST:
        return tl.load(first + batch.to(tl.int64) * length + tl.minimum(i, length - 1))
    elif WINDOW:
        return tl.maximum(i + (past - window + 1), 0)
    else:
        return i * 0


@triton.jit
def program(index, blocks, heads, groups):
    """(batch, head, key head, block) of a program: those that share keys run together, the longest rows first."""
    share = heads // groups
    block = blocks - 1 - (index // share) % blocks
    rest = index // (share * blocks)
    group = rest % groups
    return rest // groups, group * share + index % share, group, block


@triton.jit
def between(x, low, high):
    """low <= x <= high for low <= high, in one comparison: below low, the difference wraps around to a large one."""
    return (x - low).to(tl.uint32, bitcast=True) <= (high - low).to(tl.uint32, bitcast=True)


@triton.jit
def soften(acc, total, top, q, k, v, j, low, high, scale, MASK: tl.constexpr):
    """One block of keys joins the running softmax: acc [M, K], total and top [M] (the largest score so far).

    MASK: of the keys j [N], each query sees low <= j <= high, both [M].
    """
    scores = dot(q, tl.trans(k))
    if MASK:
        scores = tl.where(between(j[None, :], low[:, None], high[:, None]), scores * scale, HIDDEN)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = exp2(scores - higher[:, None])
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = exp2(scores * scale - higher[:, None])
    fade = exp2(top - higher)
    total = total * fade + tl.sum(weights, 1)
    acc = dot(weights.to(v.dtype), v, acc * fade[:, None])
    return acc, total, higher


@triton.jit(do_not_specialize=["length", "keys", "window"])
def forward_kernel(
    q,
    k,
    v,
    first,
    out,
    lse,
    length,
    padded,
    keys,
    heads,
    groups,
    window,
    scale,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
):
    """out [B, L, H, DIM], lse fp32 [B, H, padded]; lse and scale count in powers of two: scale holds log2 e.

    Grid: (blocks of BLOCK_M queries) x B x H, one number, see ``program``.
    """
    batch, head, group, block = program(tl.program_id(0), tl.cdiv(length, BLOCK_M), heads, groups)
    past = keys - length
    start = block * BLOCK_M
    base = past + start  # the key of the block's first query
    i = start + tl.arange(0, BLOCK_M)
    low = first_key(first, batch, i, length, past, window, FIRST, WINDOW)
    lowest = first_key(first, batch, start, length, past, window, FIRST, WINDOW)
    highest = first_key(first, batch, start + BLOCK_M - 1, length, past, window, FIRST, WINDOW)

    # Key block t begins at base + t BLOCK_N. All queries see blocks whole .. -1, some see begin .. whole - 1 and
    # 0 .. diagonal - 1.
    begin = -tl.cdiv(base - lowest, BLOCK_N)
    whole = tl.minimum(-(tl.maximum(base - highest, 0) // BLOCK_N), 0)
    diagonal = tl.cdiv(tl.minimum(BLOCK_M, length - start), BLOCK_N)

    queries = load_rows(q, batch, head, start, length, q_batch, q_row, q_head, DIM, BLOCK_M, WIDTH, TMA, True)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    column = tl.arange(0, BLOCK_N)
    for step in tl.range(0, diagonal + whole - begin):
        # The diagonal first: there every query sees its own key.
        t = tl.where(step < diagonal, step, step - diagonal + begin)
        at = base + t * BLOCK_N
        k_block = load_rows(k, batch, group, at, keys, k_batch, k_row, k_head, DIM, BLOCK_N, WIDTH, TMA, True)
        v_block = load_rows(v, batch, group, at, keys, v_batch, v_row, v_head, DIM, BLOCK_N, WIDTH, TMA, True)
        acc, total, top = soften(acc, total, top, queries, k_block, v_block, at + column, low, past + i, scale, True)
    for t in tl.range(whole, 0):
        at = base + t * BLOCK_N
        k_block = load_rows(k, batch, group, at, keys, k_batch, k_row, k_head, DIM, BLOCK_N, WIDTH, TMA, False)
        v_block = load_rows(v, batch, group, at, keys, v_batch, v_row, v_head, DIM, BLOCK_N, WIDTH, TMA, False)
        acc, total, top = soften(acc, total, top, queries, k_block, v_block, column, low, i, scale, False)

    inside = i < length
    # Zeros behind the end, so that the backward may read whole blocks.
    at = lse + (batch.to(tl.int64) * heads + head) * padded + i
    tl.store(at, tl.where(inside, top + log2(total), 0.0), mask=i < padded)
    dim = tl.arange(0, WIDTH)
    at = out + ((batch.to(tl.int64) * length + start) * heads + head) * DIM
    at = at + (tl.arange(0, BLOCK_M)[:, None] * (heads * DIM) + dim[None, :])
    mask = inside[:, None] & (dim < DIM)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
