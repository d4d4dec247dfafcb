"""The selective scan's kernels over time, forwards: the whole scan of a segment, and what a segment does to a state.

Lanes are channels and 16-bit B and C put the N = 16 states of a channel on two lanes, eight registers each: time is a
serial loop, without a barrier. The exponent is taken in base 2 of steps in base 2: exp(Delta A) = 2^(softplus2 A).
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="misc, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from samba_lm.ops.triton_math import LN_2, exp2, sigmoid, softplus2

UNROLL = tl.constexpr(4)
NEVER = tl.constexpr(1.0e30)
"""Sum of steps over a segment in which a document starts: nothing of the state before it is left."""


@triton.jit
def lanes(E: tl.constexpr, BE: tl.constexpr, N: tl.constexpr):
    """The program's channels [BE], which of them exist (the others stand on the last), its states' numbers [BE, N] and
    their places in [E, N]."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    inside = e < E
    e = tl.minimum(e, E - 1)
    n = tl.arange(0, N)[None, :] + tl.zeros([BE, 1], tl.int32)
    return e, inside, n, e[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def token(h, u, delta, bias, A, B, keep, live):
    """One step of the recurrence: the new h [E, N] and the step in base 2 [E]. ``live`` is False for padding."""
    step, _ = softplus2(delta + bias)
    step = tl.where(live, step, 0.0)
    decay = exp2(step[:, None] * A) * keep
    return decay * h + (step * (u * LN_2))[:, None] * B, step


@triton.jit
def kept(resets, t, L, HAS_RESETS: tl.constexpr):
    """0.0 where a document starts at token t, else 1.0."""
    if HAS_RESETS:
        return tl.where(tl.load(resets + t, mask=t < L, other=0) != 0, 0.0, 1.0)
    else:
        return 1.0


@triton.jit
def longer(total, step, keep, HAS_RESETS: tl.constexpr):
    """The sum of a segment's steps after one more token: NEVER from a document's start on."""
    total = tl.minimum(total + step, NEVER)
    if HAS_RESETS:
        total = tl.where(keep == 0.0, NEVER, total)
    return total


@triton.jit
def limit(lengths, row, L, HAS_LENGTHS: tl.constexpr):
    """The number of tokens of a row that are not padding."""
    if HAS_LENGTHS:
        return tl.minimum(tl.load(lengths + row).to(tl.int32), L)
    else:
        return L


@triton.jit
def rows(p, row: tl.constexpr, lanes):
    """UNROLL rows of a tensor, as they lie in memory."""
    loaded = ()
    for i in tl.static_range(UNROLL):
        loaded = loaded + (tl.load(p + i * row + lanes),)
    return loaded


@triton.jit(do_not_specialize=["L", "SPAN", "SEGMENTS", "TILES"])
def scan_kernel(
    u, delta, A, B, C, D, z, bias, start, resets, lengths, y, final, checkpoints,
    L, SPAN, SEGMENTS, TILES, u_batch, delta_batch, z_batch, B_batch, C_batch,
    E: tl.constexpr, u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, B_row: tl.constexpr,
    C_row: tl.constexpr, BE: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y of tokens [segment * SPAN, + SPAN) of one row and BE channels, from the state at the segment's start.

    start [B, SEGMENTS, E, N]; the last segment writes ``final`` [B, E, N]. KEEP: also the state before every tile of
    TILE tokens, [B, TILES, E, N]. SPAN is a multiple of TILE.
    """
    row, segment = tl.program_id(1), tl.program_id(2)
    e, inside, n, cell = lanes(E, BE, N)
    A = tl.load(A + cell)
    D = tl.load(D + e)
    bias = tl.load(bias + e)
    first = segment * SPAN
    last = tl.minimum(first + SPAN, L)
    valid = limit(lengths, row, L, HAS_LENGTHS)
    wide_row, wide_first = row.to(tl.int64), first.to(tl.int64)
    h = tl.load(start + (wide_row * SEGMENTS + segment) * E * N + cell)
    # Pointers that move are scalars, and lanes are added at the access: moving tensors of them would cost a register
    # and an addition for each element.
    u += wide_row * u_batch + wide_first * u_row
    delta += wide_row * delta_batch + wide_first * delta_row
    if HAS_Z:
        z += wide_row * z_batch + wide_first * z_row
    B += wide_row * B_batch + wide_first * B_row
    C += wide_row * C_batch + wide_first * C_row
    y += (wide_row * L + wide_first) * E
    if HAS_RESETS:
        resets += wide_row * L
    checkpoints += (wide_row * TILES + first // TILE) * E * N
    whole = last - (last - first) % UNROLL
    if whole > first:
        us, deltas, Bs, Cs = rows(u, u_row, e), rows(delta, delta_row, e), rows(B, B_row, n), rows(C, C_row, n)
        zs = rows(z, z_row, e) if HAS_Z else us
        for t in range(first, whole, UNROLL):
            if KEEP:
                if (t - first) % TILE == 0:
                    tl.store(checkpoints + cell, h, mask=inside[:, None])
                    checkpoints += E * N
            # The next rows are on their way while these are computed; the last time round they are the same again.
            ahead = tl.minimum(whole - UNROLL - t, UNROLL)
            u += ahead * u_row
            delta += ahead * delta_row
            B += ahead * B_row
            C += ahead * C_row
            next_us, next_deltas = rows(u, u_row, e), rows(delta, delta_row, e)
            next_Bs, next_Cs = rows(B, B_row, n), rows(C, C_row, n)
            next_zs = next_us
            if HAS_Z:
                z += ahead * z_row
                next_zs = rows(z, z_row, e)
            ys = ()
            for i in tl.static_range(UNROLL):
                x = us[i].to(tl.float32)
                keep = kept(resets, t + i, L, HAS_RESETS)
                h, _ = token(h, x, deltas[i].to(tl.float32), bias, A, Bs[i].to(tl.float32), keep, t + i < valid)
                out = tl.sum(h * Cs[i].to(tl.float32), axis=1) + D * x
                if HAS_Z:
                    gate = zs[i].to(tl.float32)
                    out = out * (gate * sigmoid(gate))
                ys = ys + (out,)
            for i in tl.static_range(UNROLL):
                tl.store(y + i * E + e, ys[i].to(y.dtype.element_ty), mask=inside)
            y += UNROLL * E
            us, deltas, zs, Bs, Cs = next_us, next_deltas, next_zs, next_Bs, next_Cs
        u += UNROLL * u_row
        delta += UNROLL * delta_row
        B += UNROLL * B_row
        C += UNROLL * C_row
        if HAS_Z:
            z += UNROLL * z_row
    if KEEP:
        if (whole - first) % TILE == 0 and whole < last:
            tl.store(checkpoints + cell, h, mask=inside[:, None])
    for t in range(whole, last):
        x, raw = tl.load(u + e).to(tl.float32), tl.load(delta + e).to(tl.float32)
        h, _ = token(h, x, raw, bias, A, tl.load(B + n).to(tl.float32), kept(resets, t, L, HAS_RESETS), t < valid)
        out = tl.sum(h * tl.load(C + n).to(tl.float32), axis=1) + D * x
        if HAS_Z:
            gate = tl.load(z + e).to(tl.float32)
            out = out * (gate * sigmoid(gate))
            z += z_row
        tl.store(y + e, out.to(y.dtype.element_ty), mask=inside)
        u += u_row
        delta += delta_row
        B += B_row
        C += C_row
        y += E
    if segment == SEGMENTS - 1:
        tl.store(final + wide_row * E * N + cell, h, mask=inside[:, None])


@triton.jit(do_not_specialize=["L", "SPAN", "SEGMENTS"])
def summary_kernel(
    u, delta, A, B, bias, resets, lengths, local, steps,
    L, SPAN, SEGMENTS, u_batch, delta_batch, B_batch,
    E: tl.constexpr, u_row: tl.constexpr, delta_row: tl.constexpr, B_row: tl.constexpr, BE: tl.constexpr,
    N: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """What a segment does to a state: ``local`` [B, SEGMENTS, E, N] its end when it starts from zero, ``steps``
    [B, SEGMENTS, E] the sum of its steps in base 2, so that h_end = local + 2^(steps A) h_start."""
    row, segment = tl.program_id(1), tl.program_id(2)
    e, inside, n, cell = lanes(E, BE, N)
    A = tl.load(A + cell)
    bias = tl.load(bias + e)
    first = segment * SPAN
    last = tl.minimum(first + SPAN, L)
    valid = limit(lengths, row, L, HAS_LENGTHS)
    wide_row, wide_first = row.to(tl.int64), first.to(tl.int64)
    u += wide_row * u_batch + wide_first * u_row
    delta += wide_row * delta_batch + wide_first * delta_row
    B += wide_row * B_batch + wide_first * B_row
    if HAS_RESETS:
        resets += wide_row * L
    h = tl.zeros([BE, N], tl.float32)
    total = tl.zeros([BE], tl.float32)
    whole = last - (last - first) % UNROLL
    if whole > first:
        us, deltas, Bs = rows(u, u_row, e), rows(delta, delta_row, e), rows(B, B_row, n)
        for t in range(first, whole, UNROLL):
            ahead = tl.minimum(whole - UNROLL - t, UNROLL)
            u += ahead * u_row
            delta += ahead * delta_row
            B += ahead * B_row
            next_us, next_deltas, next_Bs = rows(u, u_row, e), rows(delta, delta_row, e), rows(B, B_row, n)
            for i in tl.static_range(UNROLL):
                keep = kept(resets, t + i, L, HAS_RESETS)
                x, raw = us[i].to(tl.float32), deltas[i].to(tl.float32)
                h, step = token(h, x, raw, bias, A, Bs[i].to(tl.float32), keep, t + i < valid)
                total = longer(total, step, keep, HAS_RESETS)
            us, deltas, Bs = next_us, next_deltas, next_Bs
        u += UNROLL * u_row
        delta += UNROLL * delta_row
        B += UNROLL * B_row
    for t in range(whole, last):
        keep = kept(resets, t, L, HAS_RESETS)
        x, raw = tl.load(u + e).to(tl.float32), tl.load(delta + e).to(tl.float32)
        h, step = token(h, x, raw, bias, A, tl.load(B + n).to(tl.float32), keep, t < valid)
        total = longer(total, step, keep, HAS_RESETS)
        u += u_row
        delta += delta_row
        B += B_row
    tl.store(local + (wide_row * SEGMENTS + segment) * E * N + cell, h, mask=inside[:, None])
    tl.store(steps + (wide_row * SEGMENTS + segment) * E + e, total, mask=inside)


@triton.jit(do_not_specialize=["CELLS", "SEGMENTS"])
def chain_kernel(
    local, steps, A, begin, out, CELLS, SEGMENTS, N: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Chain the segments' effects: ``out`` [B, SEGMENTS, E, N] what each segment is entered with.

    Forwards segment 0 is entered with ``begin`` [B, E, N] (a state); in reverse the last one is (a gradient).
    CELLS = E * N.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = cell < CELLS
    channels = CELLS // N
    A = tl.load(A + cell, mask=inside, other=0.0)
    value = tl.load(begin + row * CELLS + cell, mask=inside, other=0.0)
    for i in range(SEGMENTS):
        s = i
        if REVERSE:
            s = SEGMENTS - 1 - i
        at = row * SEGMENTS + s
        tl.store(out + at * CELLS + cell, value, mask=inside)
        more = inside & (i < SEGMENTS - 1)  # nobody is entered with what comes after the last
        total = tl.load(steps + at * channels + cell // N, mask=more, other=0.0)
        decay = tl.where(total >= NEVER, 0.0, exp2(total * A))
        value = tl.load(local + at * CELLS + cell, mask=more, other=0.0) + decay * value
