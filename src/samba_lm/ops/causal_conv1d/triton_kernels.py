"""The short convolution's two kernels: programs that walk along time with the last taps in registers.

A program owns a block of channels and a segment of time. Lanes are channels, so that nothing crosses lanes, each input
is read from memory once (but for the k - 1 rows around a segment, which neighbours have put in the L2 cache) and the
weights once a segment. UNROLL rows are loaded at once, while the UNROLL before them are worked on.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
from __future__ import annotations

import triton
import triton.language as tl

from samba_lm.ops.triton_math import sigmoid


@triton.jit
def _weights(weight, bias, channels, inside, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The K columns of weight [E, K] and the bias, for a block of channels."""
    columns = ()
    for i in tl.static_range(K):
        columns = columns + (tl.load(weight + channels * K + i, mask=inside, other=0.0).to(tl.float32),)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    else:
        offset = tl.zeros(channels.shape, tl.float32)
    return columns, offset


@triton.jit
def _input(x, x_step, state, E, t, channels, inside, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """Row t of the input; rows before 0 are the state's, or zero."""
    row = tl.load(x + t * x_step + channels, mask=inside & (t >= 0), other=0.0).to(tl.float32)
    if HAS_STATE:
        row += tl.load(state + (t + K - 1) * E + channels, mask=inside & (t < 0), other=0.0).to(tl.float32)
    return row


@triton.jit
def _history(x, x_step, state, E, t, channels, inside, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """The K - 1 inputs before row t, oldest first."""
    taps = ()
    for i in tl.static_range(K - 1):
        taps = taps + (_input(x, x_step, state, E, t - (K - 1) + i, channels, inside, K, HAS_STATE),)
    return taps


@triton.jit
def _reaches(positions, t, stop, K: tl.constexpr, UNROLL: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """How many rows back the taps of rows t .. t+UNROLL-1 may reach, K standing for K and more."""
    reaches = ()
    for r in tl.static_range(UNROLL):
        if HAS_POSITIONS:
            reach = tl.load(positions + t + r, mask=t + r < stop, other=0)
            reaches = reaches + (tl.minimum(reach, K).to(tl.int32),)  # 32 bits: half the comparing
        else:
            reaches = reaches + (K,)
    return reaches


@triton.jit
def _within_document(window, reach, K: tl.constexpr):
    """``window`` (K rows, oldest first) with those zeroed that are more than ``reach`` rows back."""
    masked = ()
    for i in tl.static_range(K - 1):
        masked = masked + (tl.where(reach >= K - 1 - i, window[i], 0.0),)
    return masked + (window[K - 1],)


@triton.jit
def _rows(x, x_step, t, stop, channels, inside, UNROLL: tl.constexpr):
    """Rows t .. t+UNROLL-1, zero from ``stop`` on."""
    rows = ()
    for r in tl.static_range(UNROLL):
        rows = rows + (tl.load(x + (t + r) * x_step + channels, mask=inside & (t + r < stop), other=0.0),)
    return rows


@triton.jit
def _oldest_kept(positions, length, K: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """The first slot of the final state that belongs to the last document; a row that read nothing keeps its state."""
    slot = length * 0
    if HAS_POSITIONS:
        last = tl.load(positions + tl.maximum(length - 1, 0))
        slot = tl.where(length > 0, K - 2 - last, 0)
    return slot


@triton.jit(do_not_specialize=["L", "rows"])
def forward_kernel(
    x,  # [B, L, E] with the strides x_batch, x_step, 1
    weight,
    bias,
    state,
    positions,
    lengths,
    y,
    final,
    L,
    E,
    rows,  # of a segment, a multiple of UNROLL
    x_batch,
    x_step,
    position_batch,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < E
    start = tl.program_id(1).to(tl.int64) * rows
    stop = tl.minimum(start + rows, L)
    x += b * x_batch
    y += b * L * E
    state += b * (K - 1) * E
    positions += b * position_batch
    columns, offset = _weights(weight, bias, channels, inside, K, HAS_BIAS)
    taps = _history(x, x_step, state, E, start, channels, inside, K, HAS_STATE)
    coming = _rows(x, x_step, start, stop, channels, inside, UNROLL)
    reaching = _reaches(positions, start, stop, K, UNROLL, HAS_POSITIONS)
    for t in tl.range(start, stop, UNROLL):
        loaded = coming
        reaches = reaching
        coming = _rows(x, x_step, t + UNROLL, stop, channels, inside, UNROLL)
        reaching = _reaches(positions, t + UNROLL, stop, K, UNROLL, HAS_POSITIONS)
        for r in tl.static_range(UNROLL):
            window = taps + (loaded[r].to(tl.float32),)
            if HAS_POSITIONS:
                seen = _within_document(window, reaches[r], K)
            else:
                seen = window
            total = offset
            for i in tl.static_range(K):
                total += seen[i] * columns[i]
            total *= sigmoid(total)
            tl.store(y + (t + r) * E + channels, total.to(y.dtype.element_ty), mask=inside & (t + r < L))
            taps = window[1:]
    if tl.program_id(1) == tl.num_programs(1) - 1:
        length = L.to(tl.int64)
        if HAS_LENGTHS:
            length = tl.load(lengths + b)
        oldest = _oldest_kept(positions, length, K, HAS_POSITIONS)
        for i in tl.static_range(K - 1):
            row = _input(x, x_step, state, E, length - (K - 1) + i, channels, inside, K, HAS_STATE)
            row = tl.where(i >= oldest, row, 0.0)
            tl.store(final + (b * (K - 1) + i) * E + channels, row.to(final.dtype.element_ty), mask=inside)


@triton.jit
def _backward_row(
    row,
    dy,
    reach,
    t,
    taps,  # inputs t-K+1 .. t-1
    pending,  # what rows t-K+1 .. t-1 of dx have so far
    dcolumns,
    doffset,
    columns,
    offset,
    dfinal,
    dx,
    E,
    first,  # the rows of dx to store: first .. last-1
    last,
    length,
    oldest,
    channels,
    inside,
    K: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    OWN: tl.constexpr,  # the row is of this segment: it counts for the weights
):
    """One step of the walk: spreads row t's gradient over its taps and stores the row of dx that is then complete."""
    window = taps + (row.to(tl.float32),)
    if HAS_POSITIONS:
        seen = _within_document(window, reach, K)
        spreading = _within_document(columns, reach, K)
    else:
        seen = window
        spreading = columns
    total = offset
    for i in tl.static_range(K):
        total += seen[i] * columns[i]
    gate = sigmoid(total)
    dtotal = dy.to(tl.float32) * (gate + gate * total * (1.0 - gate))  # zero from row L on, where dy is
    if OWN:
        added = ()
        for i in tl.static_range(K):
            added = added + (dcolumns[i] + dtotal * seen[i],)
        dcolumns = added
        doffset += dtotal
    spread = ()
    for i in tl.static_range(K):
        if i < K - 1:
            spread = spread + (pending[i] + dtotal * spreading[i],)
        else:
            spread = spread + (dtotal * spreading[i],)
    done = spread[0]
    s = t - (K - 1)
    if HAS_DFINAL:
        slot = t - length  # of row s in the final state
        if (slot >= oldest) & (slot >= 0) & (slot < K - 1):
            done += tl.load(dfinal + slot * E + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + s * E + channels, done.to(dx.dtype.element_ty), mask=inside & (s >= first) & (s < last))
    return window[1:], spread[1:], dcolumns, doffset


@triton.jit(do_not_specialize=["L", "rows"])
def backward_kernel(
    dy,  # [B, L, E] with the strides dy_batch, dy_step, 1
    dfinal,
    x,  # [B, L, E] with the strides x_batch, x_step, 1
    weight,
    bias,
    state,
    positions,
    lengths,
    dx,
    dstate,
    partial,  # fp32 [B, segments, K+1, E]: each program's sums for weight and bias
    L,
    E,
    rows,  # of a segment, a multiple of UNROLL
    dy_batch,
    dy_step,
    x_batch,
    x_step,
    position_batch,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    HAS_DSTATE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < E
    start = tl.program_id(1).to(tl.int64) * rows
    stop = tl.minimum(start + rows, L)
    dy += b * dy_batch
    x += b * x_batch
    dx += b * L * E
    state += b * (K - 1) * E
    dstate += b * (K - 1) * E
    dfinal += b * (K - 1) * E
    positions += b * position_batch
    length = L.to(tl.int64)
    if HAS_LENGTHS:
        length = tl.load(lengths + b)
    oldest = _oldest_kept(positions, length, K, HAS_POSITIONS)
    columns, offset = _weights(weight, bias, channels, inside, K, HAS_BIAS)
    taps = _history(x, x_step, state, E, start, channels, inside, K, HAS_STATE)
    pending = ()
    dcolumns = (tl.zeros([BLOCK], tl.float32),)
    for _ in tl.static_range(K - 1):
        pending = pending + (tl.zeros([BLOCK], tl.float32),)
        dcolumns = dcolumns + (tl.zeros([BLOCK], tl.float32),)
    doffset = tl.zeros([BLOCK], tl.float32)
    if HAS_DSTATE:
        # The rows before row 0, completed by the first K - 1 rows, which the walk below reads again.
        if start == 0:
            state_taps = taps
            state_pending = pending
            for t in tl.static_range(K - 1):
                row = tl.load(x + t * x_step + channels, mask=inside & (t < L), other=0.0)
                drow = tl.load(dy + t * dy_step + channels, mask=inside & (t < L), other=0.0)
                reach = _reaches(positions, t, L, K, 1, HAS_POSITIONS)
                state_taps, state_pending, _c, _o = _backward_row(
                    row, drow, reach[0], t, state_taps, state_pending, dcolumns, doffset, columns, offset, dfinal,
                    dstate + (K - 1) * E, E, 1 - K, 0, length, oldest, channels, inside, K, HAS_POSITIONS,
                    HAS_DFINAL, False,
                )  # fmt: skip
    coming = _rows(x, x_step, start, stop, channels, inside, UNROLL)
    reaching = _reaches(positions, start, stop, K, UNROLL, HAS_POSITIONS)
    dcoming = _rows(dy, dy_step, start, stop, channels, inside, UNROLL)
    for t in tl.range(start, stop, UNROLL):
        loaded = coming
        reaches = reaching
        dloaded = dcoming
        coming = _rows(x, x_step, t + UNROLL, stop, channels, inside, UNROLL)
        reaching = _reaches(positions, t + UNROLL, stop, K, UNROLL, HAS_POSITIONS)
        dcoming = _rows(dy, dy_step, t + UNROLL, stop, channels, inside, UNROLL)
        for r in tl.static_range(UNROLL):
            taps, pending, dcolumns, doffset = _backward_row(
                loaded[r], dloaded[r], reaches[r], t + r, taps, pending, dcolumns, doffset, columns, offset, dfinal, dx,
                E, start, L, length, oldest, channels, inside, K, HAS_POSITIONS, HAS_DFINAL, True,
            )  # fmt: skip
    # The K - 1 rows after the segment, which reach back into it.
    after = start + tl.cdiv(stop - start, UNROLL) * UNROLL
    for r in tl.static_range(K - 1):
        mask = inside & (after + r < L)
        row = tl.load(x + (after + r) * x_step + channels, mask=mask, other=0.0)
        drow = tl.load(dy + (after + r) * dy_step + channels, mask=mask, other=0.0)
        reach = _reaches(positions, after + r, L, K, 1, HAS_POSITIONS)
        taps, pending, dcolumns, doffset = _backward_row(
            row, drow, reach[0], after + r, taps, pending, dcolumns, doffset, columns, offset, dfinal, dx,
            E, start, L, length, oldest, channels, inside, K, HAS_POSITIONS, HAS_DFINAL, False,
        )  # fmt: skip
    partial += (b * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * E
    for i in tl.static_range(K):
        tl.store(partial + i * E + channels, dcolumns[i], mask=inside)
    tl.store(partial + K * E + channels, doffset, mask=inside)
