"""Windowed attention's gradients: one kernel walks the keys of a query block, one the queries of a key block.

Both compute the weights anew from the saved log-sum-exp. Every sum has one owner and one order, so that the same call
gives the same bits. With S the scaled scores, W the weights and delta = rowsum(dO O):
dV = W^T dO, dS = W (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from samba_lm.ops.sliding_attention.triton_forward import HIDDEN, between, first_key, load_rows, program
from samba_lm.ops.triton_math import LN_2, dot, exp2


@triton.jit
def add_dq(dq, q, k, v, dout, lse, delta, j, low, high, scale, MASK: tl.constexpr):
    """dq [M, K] plus one block of keys' part, still without the scores' scale. MASK: low [M] <= j [N] <= high [M]."""
    scores = dot(q, tl.trans(k))
    scores = scores * scale - lse[:, None]
    if MASK:
        scores = tl.where(between(j[None, :], low[:, None], high[:, None]), scores, HIDDEN)
    weights = exp2(scores)
    slope = weights * (dot(dout, tl.trans(v)) - delta[:, None])
    return dot(slope.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["length", "keys", "window"])
def dq_kernel(
    q,
    k,
    v,
    first,
    out,
    dout,
    lse,
    delta,
    dq,
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
    dout_batch,
    dout_row,
    dout_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
):
    """dq [B, L, H, DIM], and delta fp32 [B, H, padded] for ``dkdv_kernel``. Walks the keys as the forward does."""
    batch, head, group, block = program(tl.program_id(0), tl.cdiv(length, BLOCK_M), heads, groups)
    past = keys - length
    start = block * BLOCK_M
    base = past + start
    i = start + tl.arange(0, BLOCK_M)
    inside = i < length
    low = first_key(first, batch, i, length, past, window, FIRST, WINDOW)
    lowest = first_key(first, batch, start, length, past, window, FIRST, WINDOW)
    highest = first_key(first, batch, start + BLOCK_M - 1, length, past, window, FIRST, WINDOW)
    begin = -tl.cdiv(base - lowest, BLOCK_N)
    whole = tl.minimum(-(tl.maximum(base - highest, 0) // BLOCK_N), 0)
    diagonal = tl.cdiv(tl.minimum(BLOCK_M, length - start), BLOCK_N)

    queries = load_rows(q, batch, head, start, length, q_batch, q_row, q_head, DIM, BLOCK_M, WIDTH, TMA, True)
    do = load_rows(dout, batch, head, start, length, dout_batch, dout_row, dout_head, DIM, BLOCK_M, WIDTH, TMA, True)
    row = (batch.to(tl.int64) * length * heads + head) * DIM  # of out and dq, which are contiguous
    o = load_rows(out + row, start * 0, start * 0, start, length, 0, heads * DIM, 0, DIM, BLOCK_M, WIDTH, False, True)
    dots = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (batch.to(tl.int64) * heads + head) * padded + i
    tl.store(delta + at, dots, mask=i < padded)
    norm = tl.load(lse + at, mask=inside, other=0.0)

    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    column = tl.arange(0, BLOCK_N)
    for step in tl.range(0, diagonal + whole - begin):
        t = tl.where(step < diagonal, step, step - diagonal + begin)
        at_key = base + t * BLOCK_N
        k_block = load_rows(k, batch, group, at_key, keys, k_batch, k_row, k_head, DIM, BLOCK_N, WIDTH, TMA, True)
        v_block = load_rows(v, batch, group, at_key, keys, v_batch, v_row, v_head, DIM, BLOCK_N, WIDTH, TMA, True)
        acc = add_dq(acc, queries, k_block, v_block, do, norm, dots, at_key + column, low, past + i, scale, True)
    for t in tl.range(whole, 0):
        at_key = base + t * BLOCK_N
        k_block = load_rows(k, batch, group, at_key, keys, k_batch, k_row, k_head, DIM, BLOCK_N, WIDTH, TMA, False)
        v_block = load_rows(v, batch, group, at_key, keys, v_batch, v_row, v_head, DIM, BLOCK_N, WIDTH, TMA, False)
        acc = add_dq(acc, queries, k_block, v_block, do, norm, dots, column, low, i, scale, False)

    dim = tl.arange(0, WIDTH)
    at_out = dq + row + start.to(tl.int64) * (heads * DIM)
    at_out = at_out + (tl.arange(0, BLOCK_M)[:, None] * (heads * DIM) + dim[None, :])
    mask = inside[:, None] & (dim < DIM)[None, :]
    tl.store(at_out, (acc * (scale * LN_2)).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def load_numbers(
    x, batch, head, heads, row, length, padded, BLOCK: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr
):
    """Numbers row .. row + BLOCK of one head of x fp32 [B, H, padded]: a descriptor if TMA, else a pointer."""
    if TMA:
        return x.load([batch, head, row]).reshape(BLOCK)
    else:
        i = row + tl.arange(0, BLOCK)
        x += (batch.to(tl.int64) * heads + head) * padded
        if MASKED:
            return tl.load(x + i, mask=i < length, other=0.0)
        else:
            return tl.load(x + i)


@triton.jit
def add_dkdv(dk, dv, k, v, q, dout, lse, delta, i, low, high, scale, MASK: tl.constexpr):
    """dk, dv [N, K] plus one block of queries' part, dk still without the scores' scale. MASK: low <= i <= high."""
    scores = dot(k, tl.trans(q))
    scores = scores * scale - lse[None, :]
    if MASK:
        scores = tl.where(between(i[None, :], low[:, None], high[:, None]), scores, HIDDEN)
    weights = exp2(scores)
    dv = dot(weights.to(dout.dtype), dout, dv)
    slope = weights * (dot(v, tl.trans(dout)) - delta[None, :])
    dk = dot(slope.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["length", "keys", "window"])
def dkdv_kernel(
    q,
    k,
    v,
    seen,
    dout,
    lse,
    delta,
    dk,
    dv,
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
    dout_batch,
    dout_row,
    dout_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEEN: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
):
    """dk, dv [B, S, G, DIM]. Grid: (blocks of BLOCK_N keys) x B x G, one number.

    Key j is seen by the queries max(j - P, 0) <= i < seen[j], where ``seen`` (int32 [B, S] if SEEN) counts the
    queries whose first key is j or before; without it the window decides.
    """
    index = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    block, rest = index % blocks, index // blocks
    group, batch = rest % groups, rest // groups
    past = keys - length
    base = block * BLOCK_N
    j = base + tl.arange(0, BLOCK_N)
    last = tl.minimum(base + BLOCK_N, keys) - 1
    if SEEN:
        seen += batch.to(tl.int64) * keys
        end = tl.load(seen + tl.minimum(j, keys - 1))
        lowest, highest = tl.load(seen + base), tl.load(seen + last)
    elif WINDOW:
        end = tl.minimum(j + (window - past), length)
        lowest, highest = tl.minimum(base + window - past, length), tl.minimum(last + window - past, length)
    else:
        end = j * 0 + length
        lowest, highest = length, length

    # The first and the last query of each key; far beyond both for a key that no query sees.
    low = tl.where(end > j - past, j - past, 1 << 30)
    high = tl.maximum(end - 1, low)

    # Query block t begins at begin + t BLOCK_M: blocks 0 .. diagonal - 1 and whole .. stop - 1 see some of the keys,
    # those between see all. Rows of lse and delta are read from multiples of 16 bytes.
    begin = tl.maximum(base - past, 0) // 4 * 4
    stop = tl.maximum(tl.cdiv(highest - begin, BLOCK_M), 0)
    diagonal = tl.minimum(tl.cdiv(tl.maximum(last - past - begin, 0), BLOCK_M), stop)
    whole = tl.maximum((lowest - begin) // BLOCK_M, diagonal)

    k_block = load_rows(k, batch, group, base, keys, k_batch, k_row, k_head, DIM, BLOCK_N, WIDTH, TMA, True)
    v_block = load_rows(v, batch, group, base, keys, v_batch, v_row, v_head, DIM, BLOCK_N, WIDTH, TMA, True)
    dk_acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    row = tl.arange(0, BLOCK_M)
    share = heads // groups
    for member in tl.range(0, share):
        head = group * share + member
        for step in tl.range(0, diagonal + stop - whole):
            start = begin + tl.where(step < diagonal, step, step - diagonal + whole) * BLOCK_M
            q_block = load_rows(q, batch, head, start, length, q_batch, q_row, q_head, DIM, BLOCK_M, WIDTH, TMA, True)
            do_block = load_rows(
                dout, batch, head, start, length, dout_batch, dout_row, dout_head, DIM, BLOCK_M, WIDTH, TMA, True
            )
            norm = load_numbers(lse, batch, head, heads, start, length, padded, BLOCK_M, TMA, True)
            dots = load_numbers(delta, batch, head, heads, start, length, padded, BLOCK_M, TMA, True)
            dk_acc, dv_acc = add_dkdv(
                dk_acc, dv_acc, k_block, v_block, q_block, do_block, norm, dots, start + row, low, high, scale, True
            )
        for t in tl.range(diagonal, whole):
            start = begin + t * BLOCK_M
            q_block = load_rows(q, batch, head, start, length, q_batch, q_row, q_head, DIM, BLOCK_M, WIDTH, TMA, False)
            do_block = load_rows(
                dout, batch, head, start, length, dout_batch, dout_row, dout_head, DIM, BLOCK_M, WIDTH, TMA, False
            )
            norm = load_numbers(lse, batch, head, heads, start, length, padded, BLOCK_M, TMA, False)
            dots = load_numbers(delta, batch, head, heads, start, length, padded, BLOCK_M, TMA, False)
            dk_acc, dv_acc = add_dkdv(
                dk_acc, dv_acc, k_block, v_block, q_block, do_block, norm, dots, row, low, high, scale, False
            )

    dim = tl.arange(0, WIDTH)
    at = ((batch.to(tl.int64) * keys + base) * groups + group) * DIM
    at = at + (tl.arange(0, BLOCK_N)[:, None] * (groups * DIM) + dim[None, :])
    mask = (j < keys)[:, None] & (dim < DIM)[None, :]
    tl.store(dk + at, (dk_acc * (scale * LN_2)).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at, dv_acc.to(dv.dtype.element_ty), mask=mask)
