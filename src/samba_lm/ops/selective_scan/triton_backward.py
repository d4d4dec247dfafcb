"""The selective scan's kernels over time, backwards: every gradient of a segment, and what it does to the carry.

Time runs in sub-tiles of SUB tokens from the end. Each is computed forwards again from the nearest kept state, its
states staying in registers, and then walked backwards with the one value that crosses tokens, the state's gradient.
The sums over channels that B's and C's gradients need are products with a matrix of ones, on the tensor cores.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="misc, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from samba_lm.ops.selective_scan.triton_forward import kept, lanes, limit, longer, token
from samba_lm.ops.triton_math import LN_2, exp2, reciprocal, recomputed_exp2, sigmoid, softplus2


@triton.jit(do_not_specialize=["L", "SPAN", "SEGMENTS", "TILES", "ROWS"])
def scan_backward_kernel(
    u, delta, A, B, C, D, z, bias, resets, lengths, checkpoints, dy, carries,
    du, ddelta, dz, dA, dD, dbias, dstate, dBC,
    L, SPAN, SEGMENTS, TILES, ROWS, u_batch, delta_batch, z_batch, B_batch, C_batch, dy_batch,
    E: tl.constexpr, u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, B_row: tl.constexpr,
    C_row: tl.constexpr, dy_row: tl.constexpr,
    BE: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment, one row and BE channels, given the gradient of the state at the segment's end.

    carries [B, SEGMENTS, E, N]. du, ddelta, dz [B, L, E] are written whole; dA [B * SEGMENTS, E, N], dD and dbias
    [B * SEGMENTS, E], dstate [B, E, N] and dBC [channel blocks, B, L, 2, N] are partial sums. GROUP tokens share one
    product with ones.
    """
    block, row, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    e, inside, n, cell = lanes(E, BE, N)
    A = tl.load(A + cell)
    D = tl.load(D + e)
    bias = tl.load(bias + e)
    valid = limit(lengths, row, L, HAS_LENGTHS)
    wide = row.to(tl.int64)
    u += wide * u_batch
    delta += wide * delta_batch
    dy += wide * dy_batch
    B += wide * B_batch
    C += wide * C_batch
    du += wide * L * E
    ddelta += wide * L * E
    if HAS_Z:
        z += wide * z_batch
        dz += wide * L * E
    if HAS_RESETS:
        resets += wide * L
    checkpoints += wide * TILES * E * N
    dBC += (block.to(tl.int64) * ROWS + wide) * L * 2 * N
    # Column c of a product is state c // (2 GROUP), B or C by the next bit, and one of the group's tokens.
    column = tl.arange(0, 2 * N * GROUP)
    lane = tl.arange(0, 16)[:, None]
    ones = tl.full([16, BE], 1.0, tl.float32)
    carry = tl.load(carries + (wide * SEGMENTS + segment) * E * N + cell)
    sum_dA = tl.zeros([BE, N], tl.float32)
    sum_dD = tl.zeros([BE], tl.float32)
    lost_dD = tl.zeros([BE], tl.float32)
    sum_dbias = tl.zeros([BE], tl.float32)
    first = segment * SPAN
    last = tl.minimum(first + SPAN, L)
    for k in range(tl.cdiv(last - first, SUB) - 1, -1, -1):
        t0 = first + k * SUB
        at = t0.to(tl.int64)
        tile = t0 // TILE
        h = tl.load(checkpoints + tile.to(tl.int64) * E * N + cell)
        back = t0 - tile * TILE
        u_at, delta_at, B_at = u + (at - back) * u_row, delta + (at - back) * delta_row, B + (at - back) * B_row
        for i in range(back):
            x, raw = tl.load(u_at + e).to(tl.float32), tl.load(delta_at + e).to(tl.float32)
            keep, live = kept(resets, t0 - back + i, L, HAS_RESETS), t0 - back + i < valid
            h, _ = token(h, x, raw, bias, A, tl.load(B_at + n).to(tl.float32), keep, live)
            u_at += u_row
            delta_at += delta_row
            B_at += B_row
        u_at, delta_at, B_at, C_at = u + at * u_row, delta + at * delta_row, B + at * B_row, C + at * C_row
        states, steps, slopes, inputs = (), (), (), ()
        for i in tl.static_range(SUB):
            exists = t0 + i < L
            x = tl.load(u_at + i * u_row + e, mask=exists, other=0.0).to(tl.float32)
            raw = tl.load(delta_at + i * delta_row + e, mask=exists, other=0.0).to(tl.float32) + bias
            b = tl.load(B_at + i * B_row + n, mask=exists, other=0.0).to(tl.float32)
            step, w = softplus2(raw)
            r = reciprocal(1.0 + w)
            live = t0 + i < valid
            step = tl.where(live, step, 0.0)
            states = states + (h,)
            steps = steps + (step,)
            slopes = slopes + (tl.where(live, tl.where(raw >= 0.0, r, w * r), 0.0),)  # of the softplus: a sigmoid
            inputs = inputs + (x,)
            decay = exp2(step[:, None] * A) * kept(resets, t0 + i, L, HAS_RESETS)
            h = decay * h + (step * (x * LN_2))[:, None] * b
        for g in tl.static_range(SUB // GROUP - 1, -1, -1):
            products = ()
            for i in tl.static_range(g * GROUP + GROUP - 1, g * GROUP - 1, -1):
                exists = t0 + i < L
                written = inside & exists
                b = tl.load(B_at + i * B_row + n, mask=exists, other=0.0).to(tl.float32)
                c = tl.load(C_at + i * C_row + n, mask=exists, other=0.0).to(tl.float32)
                # Zero outside, so that neither lanes nor tokens beyond the end enter a sum.
                dout = tl.load(dy + (at + i) * dy_row + e, mask=written, other=0.0).to(tl.float32)
                x = inputs[i]
                if HAS_Z:
                    gate = tl.load(z + (at + i) * z_row + e, mask=exists, other=0.0).to(tl.float32)
                    s = sigmoid(gate)
                    out = tl.sum(h * c, axis=1) + D * x
                    dgate = dout * out * (s * (1.0 + gate * (1.0 - s)))
                    tl.store(dz + (at + i) * E + e, dgate.to(dz.dtype.element_ty), mask=written)
                    dout = dout * (gate * s)
                step = steps[i] * LN_2
                grad = carry + dout[:, None] * c
                entered = tl.where(inside, step * x, 0.0)
                products = products + (tl.join(entered[:, None] * grad, dout[:, None] * h),)
                dx = tl.sum(grad * b, axis=1)
                carry = recomputed_exp2(steps[i][:, None] * A) * kept(resets, t0 + i, L, HAS_RESETS) * grad
                h = states[i]
                through = carry * h
                sum_dA += through * step[:, None]
                draw = (tl.sum(through * A, axis=1) + dx * x) * slopes[i]
                sum_dbias += draw
                # What rounding takes away is carried on: a row may have a million tokens.
                part = dout * x - lost_dD
                longer_dD = sum_dD + part
                lost_dD = (longer_dD - sum_dD) - part
                sum_dD = longer_dD
                tl.store(du + (at + i) * E + e, (dx * step + D * dout).to(du.dtype.element_ty), mask=written)
                tl.store(ddelta + (at + i) * E + e, draw.to(ddelta.dtype.element_ty), mask=written)
            # products[0] is the group's last token.
            if GROUP == 4:
                late = tl.join(products[0], products[1])
                early = tl.join(products[2], products[3])
                together = tl.join(late, early)  # [BE, N, 2, 2 (low bit), 2 (high bit)]
                token_of = 3 - ((column // 2) % 2 + 2 * (column % 2))
            elif GROUP == 2:
                together = tl.join(products[0], products[1])
                token_of = 1 - column % 2
            else:
                together = products[0]
                token_of = column * 0
            sums = tl.dot(ones, tl.reshape(together, [BE, 2 * N * GROUP]), input_precision=PRECISION)
            t = t0 + g * GROUP + token_of
            where = t.to(tl.int64) * 2 * N + (column // GROUP) % 2 * N + column // (2 * GROUP)
            tl.store(dBC + where[None, :] + lane * 0, sums, mask=(lane == 0) & (t < L)[None, :])
    place = wide * SEGMENTS + segment
    tl.store(dA + place * E * N + cell, sum_dA, mask=inside[:, None])
    tl.store(dD + place * E + e, sum_dD, mask=inside)
    tl.store(dbias + place * E + e, sum_dbias, mask=inside)
    if segment == 0:
        tl.store(dstate + wide * E * N + cell, carry, mask=inside[:, None])


@triton.jit(do_not_specialize=["L", "SPAN", "SEGMENTS"])
def carry_kernel(
    delta, A, C, z, bias, resets, lengths, dy, local, steps,
    L, SPAN, SEGMENTS, delta_batch, z_batch, C_batch, dy_batch,
    E: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, C_row: tl.constexpr, dy_row: tl.constexpr,
    BE: tl.constexpr, N: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the gradient of the state: ``local`` [B, SEGMENTS, E, N] that of its first state when its
    last has none, ``steps`` [B, SEGMENTS, E] the sum of its steps in base 2."""
    row, segment = tl.program_id(1), tl.program_id(2)
    e, inside, n, cell = lanes(E, BE, N)
    A = tl.load(A + cell)
    bias = tl.load(bias + e)
    first = segment * SPAN
    last = tl.minimum(first + SPAN, L)
    valid = limit(lengths, row, L, HAS_LENGTHS)
    wide = row.to(tl.int64)
    delta += wide * delta_batch
    dy += wide * dy_batch
    C += wide * C_batch
    if HAS_Z:
        z += wide * z_batch
    if HAS_RESETS:
        resets += wide * L
    carry = tl.zeros([BE, N], tl.float32)
    total = tl.zeros([BE], tl.float32)
    for i in range(last - first):
        t = last - 1 - i
        at = t.to(tl.int64)
        step, _ = softplus2(tl.load(delta + at * delta_row + e).to(tl.float32) + bias)
        step = tl.where(t < valid, step, 0.0)
        dout = tl.load(dy + at * dy_row + e).to(tl.float32)
        if HAS_Z:
            gate = tl.load(z + at * z_row + e).to(tl.float32)
            dout = dout * (gate * sigmoid(gate))
        keep = kept(resets, t, L, HAS_RESETS)
        carry = exp2(step[:, None] * A) * keep * (carry + dout[:, None] * tl.load(C + at * C_row + n).to(tl.float32))
        total = longer(total, step, keep, HAS_RESETS)
    tl.store(local + (wide * SEGMENTS + segment) * E * N + cell, carry, mask=inside[:, None])
    tl.store(steps + (wide * SEGMENTS + segment) * E + e, total, mask=inside)
