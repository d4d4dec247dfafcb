"""Drawing a token on the GPU, without a sort: the furthest distance is found some bits at a time.

A row is cut into chunks, one program each. A launch sums what a chunk holds up to several distances; the next one adds
up the chunks, and so knows some more bits of the distance that is looked for: 8 bits of top-k's from a histogram, 4 of
top-p's from 16 sums of masses. Two more launches sum the candidates' masses by chunks and pick the token. All sums are
of whole numbers, so that no result depends on the batch or on how rows are cut; which launches there are follows from
``cut`` alone, so that one CUDA graph serves all options. Rows that do not ask for something leave its launches at once.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from samba_lm.ops.backend import INTERPRETED
from samba_lm.ops.draw.reference import GOLDEN, GREEDY_BELOW, HOTTEST, MIX, UNIT, signed
from samba_lm.ops.shapes import last_dense
from samba_lm.ops.triton_math import exp2

PARTS = 32
"""Chunks of a row at most."""
LEAST = 1024
"""Tokens of a chunk at least."""
COUNT_SHIFTS, COUNT_BINS = (24, 16, 8, 0), 256
SUM_SHIFTS, SUM_BINS = (28, 24, 20, 16, 12, 8, 4, 0), 16
"""The lowest of the bits that a launch finds, and how many values they have. A distance has 31 bits in all."""
WARPS = 8
EARLY = True
"""On GPUs that can, a kernel's programs take their places before those of the one before it have all ended."""

_COUNT_BITS, _SUM_BITS = tl.constexpr(8), tl.constexpr(4)
_UNIT = tl.constexpr(UNIT)
_GREEDY_BELOW, _HOTTEST = tl.constexpr(GREEDY_BELOW), tl.constexpr(HOTTEST)
_GOLDEN, _FACTOR_1, _FACTOR_2 = (tl.constexpr(signed(x)) for x in (GOLDEN, MIX[0][1], MIX[1][1]))
_INFINITY, _RULED_OUT = tl.constexpr(float("inf")), tl.constexpr(float("-inf"))
_ALL = tl.constexpr(2**31 - 1)
_NOT_FINITE = tl.constexpr(-1)


@triton.jit
def _in_turn():
    """Let the next kernel take its place, and wait for the one before this: it reads what that writes."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def _keys(logits, row, stride, column, V, best):
    """Distances and, as int32, their bits, which order as they do; past the row's end infinitely far."""
    x = tl.load(logits + row * stride + column, mask=column < V, other=_RULED_OUT)
    distance = best - x
    return distance, distance.to(tl.int32, bitcast=True)


@triton.jit
def _weights(distance, temperature):
    scale = tl.where(temperature < _GREEDY_BELOW, 1.0, tl.minimum(temperature, _HOTTEST))
    return exp2(distance * (-1.4426950408889634 / scale))  # LOG2_E: the interpreter divides a constexpr wrongly


@triton.jit
def _masses(weight):
    return (weight * _UNIT).to(tl.int64)


@triton.jit
def _counted(at, counts, found, parts, PARTS: tl.constexpr, BINS: tl.constexpr):
    """The bits known after a launch of ``_count`` of this row, and how many tokens are still to be counted from there:
    ``found`` holds both from before it."""
    part, bin = tl.arange(0, PARTS), tl.arange(0, BINS)
    tile = tl.load(counts + (at * PARTS + part)[:, None] * BINS + bin[None, :], mask=(part < parts)[:, None], other=0)
    held = tl.sum(tile, 0)
    need = tl.load(found + 2 * at + 1)
    digit = tl.sum((tl.cumsum(held, 0) < need).to(tl.int32), 0)
    prefix = (tl.load(found + 2 * at) << _COUNT_BITS) + digit
    return prefix, need - tl.sum(tl.where(bin < digit, held, 0), 0)


@triton.jit(do_not_specialize=["shift", "parts"])
def _count(
    logits, best_ptr, top_k, counts_before, found_before, counts, found, V, stride, shift, parts,
    FIRST: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """counts int32 [B, PARTS, BINS], found int32 [B, 2]. Grid: (parts, B)."""
    if EARLY:
        _in_turn()
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best, k = tl.load(best_ptr + row), tl.load(top_k + row)
    if (tl.abs(best) < _INFINITY) & (k < V):
        if FIRST:
            prefix, need = 0, k.to(tl.int32)
        else:
            prefix, need = _counted(row, counts_before, found_before, parts, PARTS, BINS)
        if part == 0:
            tl.store(found + 2 * row, prefix)
            tl.store(found + 2 * row + 1, need)
        _, key = _keys(logits, row, stride, part * CHUNK + tl.arange(0, CHUNK), V, best)
        digit = (key >> shift) - prefix * BINS
        held = tl.histogram(digit, BINS, mask=(digit >= 0) & (digit < BINS))
        tl.store(counts + (row * PARTS + part) * BINS + tl.arange(0, BINS), held)


@triton.jit
def _summed(at, top_p, totals, sums, found, parts, PARTS: tl.constexpr, BINS: tl.constexpr):
    """The bits known after a launch of ``_sum`` of this row; ``found`` holds those from before it, ``totals`` the sums
    of the first launch."""
    part, bin = tl.arange(0, PARTS), tl.arange(0, BINS)
    tile = (at * PARTS + part)[:, None] * BINS + bin[None, :]
    held = tl.sum(tl.load(sums + tile, mask=(part < parts)[:, None], other=0), 0)
    # The last of its sums holds all.
    total = tl.sum(tl.load(totals + (at * PARTS + part) * BINS + BINS - 1, mask=part < parts, other=0), 0)
    share = tl.load(top_p + at).to(tl.float64) * total.to(tl.float64)
    need = share.to(tl.int64)
    need = tl.minimum(tl.maximum(tl.where(need.to(tl.float64) < share, need + 1, need), 1), total)
    return (tl.load(found + at) << _SUM_BITS) + tl.sum((held < need).to(tl.int32), 0)


@triton.jit(do_not_specialize=["shift", "parts"])
def _sum(
    logits, best_ptr, temperature, top_k, top_p, counts, found_by_count, limits,
    totals, sums_before, found_before, sums, found, V, stride, shift, parts,
    FIRST: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, COUNT_BINS: tl.constexpr,
    LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """sums int64 [B, PARTS, BINS], of the masses up to BINS distances; found int32 [B]; limits int32 [B], the furthest
    distance by top-k. Grid: (parts, B)."""
    if EARLY:
        _in_turn()
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best, p = tl.load(best_ptr + row), tl.load(top_p + row)
    if tl.abs(best) < _INFINITY:
        if FIRST:
            limit = _ALL
            if tl.load(top_k + row) < V:
                limit, _ = _counted(row, counts, found_by_count, parts, PARTS, COUNT_BINS)
            if part == 0:
                tl.store(limits + row, limit)
        if p < 1:
            if FIRST:
                prefix = 0
            else:
                limit = tl.load(limits + row)
                prefix = _summed(row, top_p, totals, sums_before, found_before, parts, PARTS, BINS)
            if part == 0:
                tl.store(found + row, prefix)
            heat, bin = tl.load(temperature + row), tl.arange(0, BINS)
            held = tl.zeros((BINS, LANES), tl.int64)
            for begin in tl.static_range(0, CHUNK, LANES):
                column = part * CHUNK + begin + tl.arange(0, LANES)
                distance, key = _keys(logits, row, stride, column, V, best)
                mass = tl.where(key <= limit, _masses(_weights(distance, heat)), 0)
                inside = (key >> shift)[None, :] <= (prefix * BINS + bin)[:, None]
                held += tl.where(inside, mass[None, :], 0)
            tl.store(sums + (row * PARTS + part) * BINS + bin, tl.sum(held, 1))


@triton.jit
def _candidates(logits, row, stride, column, V, best, temperature, min_p, furthest, CUT: tl.constexpr):
    """Masses, 0 of those that may not be drawn."""
    distance, key = _keys(logits, row, stride, column, V, best)
    weight = _weights(distance, tl.load(temperature + row))
    mass = _masses(weight)
    if CUT:
        mass = tl.where((key <= furthest) & (weight >= tl.load(min_p + row)), mass, 0)
    return mass


@triton.jit(do_not_specialize=["parts"])
def _add_up(
    logits, best_ptr, temperature, top_p, min_p, limits, totals, sums, found, furthest_ptr, held, V, stride, parts,
    CUT: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """held int64 [B, PARTS], the candidates' masses by chunks; furthest int32 [B]. Grid: (parts, B)."""
    if EARLY:
        _in_turn()
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best = tl.load(best_ptr + row)
    if tl.abs(best) < _INFINITY:
        furthest = _ALL
        if CUT:
            furthest = tl.load(limits + row)
            if tl.load(top_p + row) < 1:
                furthest = _summed(row, top_p, totals, sums, found, parts, PARTS, BINS)
            if part == 0:
                tl.store(furthest_ptr + row, furthest)
        column = part * CHUNK + tl.arange(0, CHUNK)
        mass = _candidates(logits, row, stride, column, V, best, temperature, min_p, furthest, CUT)
        tl.store(held + row * PARTS + part, tl.sum(mass, 0))


@triton.jit
def _mix(x):
    """SplitMix64's output for the state ``x``."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FACTOR_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _FACTOR_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["parts"])
def _pick(
    logits, best_ptr, likeliest, temperature, min_p, furthest_ptr, held, seed, position, out, V, stride, parts,
    CUT: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out int64 [B]. Grid: B."""
    if EARLY:
        _in_turn()
    row = tl.program_id(0).to(tl.int64)
    best = tl.load(best_ptr + row)
    token = tl.load(likeliest + row)
    if tl.abs(best) < _INFINITY:
        if tl.load(temperature + row) >= _GREEDY_BELOW:
            part = tl.arange(0, PARTS)
            mass = tl.load(held + row * PARTS + part, mask=part < parts, other=0)
            total = tl.sum(mass, 0)
            bits = _mix(_mix(tl.load(seed + row) + _GOLDEN) + (tl.load(position + row) + 1) * _GOLDEN)
            share = ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
            target = tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)
            chunk = tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
            target -= tl.sum(tl.where(part < chunk, mass, 0), 0)
            furthest = _ALL
            if CUT:
                furthest = tl.load(furthest_ptr + row)
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            mass = _candidates(logits, row, stride, column, V, best, temperature, min_p, furthest, CUT)
            token = (chunk * CHUNK + tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32), 0)).to(tl.int64)
    else:
        token = tl.full((), _NOT_FINITE, tl.int64)
    tl.store(out + row, token)


class _Found(NamedTuple):
    """How rows are cut, and what the searches leave for the last kernel."""

    chunk: int
    parts: int
    early: bool
    held: torch.Tensor
    """int64 [B, PARTS], the candidates' masses by chunks."""
    furthest: torch.Tensor
    """int32 [B], the bits of the furthest distances; anything where nothing was cut."""


def _search(logits, best, temperature, top_k, top_p, min_p, cut) -> _Found:
    (rows, V), stride = logits.shape, logits.stride(0)
    chunk = max(LEAST, triton.next_power_of_2(triton.cdiv(V, PARTS)))
    parts = triton.cdiv(V, chunk)
    grid, early = (parts, rows), EARLY and _can_be_early(logits.device)
    first = {"CHUNK": chunk, "PARTS": PARTS, "EARLY": early, "num_warps": WARPS}
    # The first kernel reads what others, which know nothing of this, have made: it waits for their end.
    next = first | {"launch_pdl": True} if early else first

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=logits.device)

    held = empty(rows, PARTS, dtype=torch.int64)
    limits = furthest = found = sums = held  # where nothing is cut, nobody reads these
    if cut:
        limits, furthest = empty(rows), empty(rows)
        counts, counted = empty(len(COUNT_SHIFTS), rows, PARTS, COUNT_BINS), empty(len(COUNT_SHIFTS), rows, 2)
        for i, shift in enumerate(COUNT_SHIFTS):
            _count[grid](
                logits, best, top_k, counts[i - 1], counted[i - 1], counts[i], counted[i], V, stride, shift, parts,
                FIRST=i == 0, BINS=COUNT_BINS, **(next if i else first), enable_fp_fusion=True,
            )  # fmt: skip
        sums = empty(len(SUM_SHIFTS), rows, PARTS, SUM_BINS, dtype=torch.int64)
        found = empty(len(SUM_SHIFTS), rows)
        for i, shift in enumerate(SUM_SHIFTS):
            _sum[grid](
                logits, best, temperature, top_k, top_p, counts[-1], counted[-1], limits,
                sums[0], sums[i - 1], found[i - 1], sums[i], found[i], V, stride, shift, parts,
                FIRST=i == 0, BINS=SUM_BINS, COUNT_BINS=COUNT_BINS, LANES=32 * WARPS, **next, enable_fp_fusion=True,
            )  # fmt: skip
    _add_up[grid](
        logits, best, temperature, top_p, min_p, limits, sums[0], sums[-1], found[-1], furthest, held, V, stride,
        parts, CUT=cut, BINS=SUM_BINS, **(next if cut else first), enable_fp_fusion=True,
    )  # fmt: skip
    return _Found(chunk, parts, early, held, furthest)


def _can_be_early(device: torch.device) -> bool:
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def furthest_triton(logits, best, temperature, top_k, top_p, min_p) -> torch.Tensor:
    """As ``furthest_reference``, of logits fp32 [B, V] whose largest are ``best`` [B], for tests."""
    with torch.cuda.device_of(logits):
        bits = _search(logits, best, temperature, top_k, top_p, min_p, True).furthest
    return torch.where(bits == _ALL.value, torch.inf, bits.view(torch.float32))


@torch.library.custom_op("samba_lm::draw", mutates_args=())
def draw_triton(
    logits: torch.Tensor, best: torch.Tensor, likeliest: torch.Tensor,
    temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    seed: torch.Tensor, position: torch.Tensor, cut: bool,
) -> torch.Tensor:  # fmt: skip
    """As ``samba_lm.ops.draw.draw``."""
    logits = last_dense(logits)
    best, likeliest, temperature, top_k, top_p, min_p, seed, position = (
        x.contiguous() for x in (best, likeliest, temperature, top_k, top_p, min_p, seed, position)
    )
    out = torch.empty_like(likeliest)
    with torch.cuda.device_of(logits):
        found = _search(logits, best, temperature, top_k, top_p, min_p, cut)
        _pick[(len(logits),)](
            logits, best, likeliest, temperature, min_p, found.furthest, found.held, seed, position, out,
            logits.shape[1], logits.stride(0), found.parts, CUT=cut, CHUNK=found.chunk, PARTS=PARTS, EARLY=found.early,
            enable_fp_fusion=True, num_warps=WARPS, **({"launch_pdl": True} if found.early else {}),
        )  # fmt: skip
    return out


@draw_triton.register_fake
def _(logits, best, likeliest, temperature, top_k, top_p, min_p, seed, position, cut):
    return torch.empty_like(likeliest)
