"""How the decoding kernels are launched: how the work is cut, the macros, shared memory and parameters.

Every function gives an ``nvrtc.Launch`` that holds addresses: its tensors must stay where they are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from samba_lm.ops import nvrtc

KERNELS = Path(__file__).parent / "kernels"
PRIMITIVES = Path(__file__).parents[1] / "selective_scan" / "kernels" / "primitives.cuh"
ROWS = 16
"""Sequences at most: two eights, the second operand of the tensor cores."""
NEEDS = (9, 0)
"""Compute capability: kernels begin before the one before them has ended."""
WARPS, PAIRS, CHUNK = 8, 8, 16 * 128
"""As in linear.cuh; bytes of a chunk."""
BITS = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}
"""Of a number of a weight, by what the weight is kept in."""
COLUMNS = 64
"""A warp's columns are counted in these: a chunk in bf16, half of one in 8 bits, a quarter in 4."""
CHUNKS, MOST_CHUNKS = 4, 6
"""Of a warp's columns, where they can be cut into slices, and where they cannot: its part of x lies in registers."""
CHANNELS = 32
"""As in scan.cuh."""
RUN, MOST = 512, 16
"""Slots of keys that a block looks at, at least; pieces that a row's cache is cut into, at most."""
TOGETHER = 1
"""Key heads that a block looks at, at most: a power of two up to 8."""
EPILOGUES = {"PARTIAL": 0, "PLAIN": 1, "SWIGLU": 2, "QKV": 3, "CONV": 4}


class Tuning(NamedTuple):
    """What can be chosen freely: no result depends on it."""

    processors: int = 132
    """Multiprocessors."""
    depth: int = 3
    """Chunks of 16 rows and 128 bytes that a warp fetches ahead, one more for up to 8 rows. More of them would hold up
    what else a kernel reads."""
    blocks: int = 2
    """Of a product, that share a multiprocessor."""
    stages: int = 3
    """Of 16 slots of keys and values that a warp fetches ahead."""
    early: bool = True
    """Kernels may begin before the one before them has ended."""


class Rings(NamedTuple):
    """Where the projection to queries, keys and values puts the latter two."""

    cos: Tensor | None
    sin: Tensor | None
    keys: Tensor
    values: Tensor
    position: Tensor
    heads: int


class Convolution(NamedTuple):
    """The convolution that follows the projection into a Mamba layer; gate: its second half, [rows, E]."""

    weight: Tensor
    bias: Tensor
    inputs: Tensor
    gate: Tensor


def ceil_div(n: int, parts: int) -> int:
    return -(-n // parts)


def operand_shape(columns: int) -> tuple[int, ...]:
    """Of what products read and other kernels write, bf16: of 32 columns each the rows 0-7, then 8-15 if there are more
    than 8 rows. Lines of a warp's loads lie together so, which saves a tenth of a step of 16 rows on an H100."""
    return (ceil_div(columns, 32), ROWS, 32)


def slices(K: int, chunks: int = CHUNKS) -> int:
    """Into how many slices K columns are cut that are summed afterwards; depends on nothing else."""
    return ceil_div(ceil_div(K, COLUMNS), WARPS * chunks)


def linear(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    rows: int,
    epilogue: str,
    tuning: Tuning,
    *,
    parts: int = 1,
    scale: Tensor | None = None,
    columns: int | None = None,
    rings: Rings | None = None,
    convolution: Convolution | None = None,
) -> nvrtc.Launch:
    """x W^T: fp32 sums of ``parts`` slices of the columns, [parts, rows, N], or what ``epilogue`` makes of it.

    x is an operand (:func:`operand_shape`) of K columns. W is bf16, or what ``quantize`` of ops/quantized_linear makes
    of it, with its ``scale``; in 4 bits K is given as ``columns``. N is even, K a multiple of 8, in 8 bits of 16; see
    linear.cuh for the epilogues and the shape of their ``y``.
    """
    N, bits = weight.shape[0], BITS[weight.dtype]
    K = weight.shape[1] if columns is None else columns
    assert (bits < 16) == (scale is not None)
    assert (bits == 4) == (columns is not None)
    wide = 128 * 8 // bits
    chunks = ceil_div(ceil_div(K, wide), WARPS * parts)
    half = 1
    if epilogue == "SWIGLU":
        half = N // 2
    elif rings is not None:
        half = rings.keys.shape[3] // 2
    pairs = N // 2
    share = PAIRS * ceil_div(pairs, PAIRS * max(1, tuning.blocks * tuning.processors // parts))  # whole tiles
    blocks = ceil_div(pairs, share)
    eights = ceil_div(rows, 8)
    # Fewer bytes come of narrow weights in the same time, and fewer need be on their way.
    depth = min(tuning.depth + (eights == 1) - (bits < 16), share // PAIRS * chunks)
    defines = {
        "BITS": bits,
        "KC": chunks,
        "ROWS8": eights,
        "DEPTH": depth,
        "HALF": half,
        "EPILOGUE": EPILOGUES[epilogue],
        "BLOCKS": 2 if chunks * wide // COLUMNS * eights <= 8 else 1,
    }
    shared = WARPS * depth * (CHUNK + (16 * 16 if bits == 4 else 0)) + 2 * WARPS * 16 * (8 * eights + 1) * 4
    qkv: tuple[int, ...] = (0,) * 8
    if rings is not None:
        cos, sin, keys, values, position, heads = rings
        qkv = (*_addresses(cos, sin, keys, values, position), heads, keys.shape[2], keys.shape[1])
    conv: tuple[int, ...] = (0,) * 4
    if convolution is not None:
        conv = _addresses(convolution.weight, convolution.bias, convolution.inputs, convolution.gate)
    numbers = (*_addresses(weight, x, y), rows, N, K, share, *qkv, *conv, *_addresses(scale))
    return _launch("linear", defines, (blocks, parts), 32 * WARPS, shared, numbers, tuning)


def norm(
    stream: Tensor,
    partials: Tensor,
    weight: Tensor,
    normed: Tensor,
    rows: int,
    eps: float,
    parts: int,
    tuning: Tuning,
    position: Tensor | None = None,
) -> nvrtc.Launch:
    """stream += the branch whose ``parts`` are given; normed = RMSNorm of it; positions, if given, move on by one."""
    numbers = (*_addresses(stream, partials, weight, normed), rows, stream.shape[1])
    rest = (*_addresses(position, None, None), 0, 0, 0, 0, 0)
    return _norm(parts, stream.shape[1], rows, numbers, eps, rest, tuning)


def begin(
    stream: Tensor,
    weight: Tensor,
    normed: Tensor,
    rows: int,
    eps: float,
    position: Tensor,
    tokens: Tensor,
    embedding: Tensor,
    angles: tuple[Tensor, Tensor, Tensor] | None,
    tuning: Tuning,
) -> nvrtc.Launch:
    """The first kernel of a step, which waits for all work before it: stream = embeddings of ``tokens``, normed, and
    (frequency, cos, sin) the rotations' angles."""
    frequency, cos, sin = angles or (None, None, None)
    half = 0 if frequency is None else frequency.shape[0]
    numbers = (*_addresses(stream, None, weight, normed), rows, stream.shape[1])
    rest = (*_addresses(position, tokens, embedding), embedding.shape[0], half, *_addresses(frequency, cos, sin))
    return _norm(0, stream.shape[1], rows, numbers, eps, rest, tuning._replace(early=False))


def _norm(
    parts: int, width: int, rows: int, numbers: tuple[int, ...], eps: float, rest: tuple[int, ...], tuning: Tuning
) -> nvrtc.Launch:
    defines = {"SLICES": parts, "PER": ceil_div(width, 4 * 256)}
    parameters = struct.pack(f"<{len(numbers)}qd{len(rest)}q", *numbers, eps, *rest)
    return nvrtc.Launch(
        "decode_norm", _files("norm"), tuple(defines.items()), (rows, 1), 256, 32, parameters, tuning.early, True
    )


def scan(
    partials: Tensor,
    weight: Tensor,
    u: Tensor,
    z: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    state: Tensor,
    y: Tensor,
    rows: int,
    parts: int,
    tuning: Tuning,
) -> nvrtc.Launch:
    """A step of the scan: ``partials`` [parts, rows, rank + 2 N] are the sums of low, B and C; ``state`` moves on."""
    (E, rank), N = weight.shape, A.shape[1]
    wide = ceil_div(rank, 32) * 32
    room = 8 * ceil_div(rows, 8)
    defines = {"N": N, "R": wide, "SLICES": parts, "ROWS8": room // 8}
    shared = room * CHANNELS * N * 4 + (CHANNELS + room) * (wide // 8 + 1) * 16 + room * (2 * N + CHANNELS) * 4
    shared += 2 * room * CHANNELS * 2
    numbers = (*_addresses(partials, weight, u, z, A, D, bias, state, y), rows, E, rank)
    return _launch("scan", defines, (ceil_div(E, CHANNELS), 1), 32 * room, shared, numbers, tuning)


class Cache(NamedTuple):
    """Keys and values [rows, slots, G, K], position p in slot p modulo slots, and their queries [rows, H, K], which see
    the positions up to their own less ``lag``."""

    q: Tensor
    keys: Tensor
    values: Tensor
    lag: int = 0


def turn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    frequency: Tensor,
    near: Cache,
    far: Cache,
    group: int,
    shift: int,
    rows: int,
    tuning: Tuning,
) -> nvrtc.Launch:
    """The queries and the newest slots of SelfExtend's two caches from q [rows, H, K], k, v [rows, G, K] as projected.

    ``frequency``: fp64 [K / 2], of the rotations; far positions are p // group, of queries ``shift`` more.
    """
    heads, (near_slots, groups, width) = q.shape[1], near.keys.shape[1:]
    places = (near.q, far.q, near.keys, near.values, far.keys, far.values)
    sizes = (heads, groups, near_slots, far.keys.shape[1], group, shift)
    numbers = (*_addresses(q, k, v, position, frequency, *places), *sizes)
    blocks = ceil_div((heads + 2 * groups) * width // 4, 256)
    return _launch("turn", {"HALF": width // 2}, (rows, blocks), 256, 12 * width, numbers, tuning)


class Parts(NamedTuple):
    """Where runs of slots leave what they found: fp32 [rows, H, room, K] and [rows, H, room, 2], and int32 zeros
    [rows, G], which are zero again after every kernel."""

    sums: Tensor
    tops: Tensor
    counters: Tensor


def runs(slots: int) -> int:
    """Runs of a cache at most; of all caches of a kernel together there must be ``room`` in its parts."""
    return min(MOST, ceil_div(slots, RUN))


def attend(
    caches: Sequence[Cache], position: Tensor, parts: Parts, y: Tensor, rows: int, scale: float, tuning: Tuning
) -> nvrtc.Launch:
    """y [rows, H, K], bf16: softmax attention of a query a row over all its ``caches`` at once."""
    groups, width = caches[0].keys.shape[2:]
    heads, room = parts.sums.shape[1:3]
    together, depth = math.gcd(TOGETHER, groups), max(2, tuning.stages * 64 // width)
    defines = {
        "SOURCES": len(caches),
        "WIDTH": width,
        "GROUPS": groups,
        "SHARE": heads // groups,
        "TOGETHER": together,
        "RUN": RUN,
        "MOST": MOST,
        "DEPTH": depth,
    }
    units = rows * groups // together * sum(runs(cache.keys.shape[1]) for cache in caches)
    shared = WARPS * depth * 2 * 16 * width * 2 + 16
    sources = [(*_addresses(q, keys, values), keys.shape[1], lag) for q, keys, values, lag in caches]
    numbers = (*(n for source in sources for n in source), *_addresses(position, *parts, y), rows, room)
    parameters = struct.pack(f"<{len(numbers)}qd", *numbers, scale * 1.4426950408889634)
    # As many blocks as there is room for at once: each takes one unit after the other.
    grid = (min(units, 2 * tuning.processors), 1)
    files = (*_files("attend")[:-1], KERNELS / "blocks.cuh", KERNELS / "attend.cuh")
    return nvrtc.Launch(
        "decode_attend", files, tuple(defines.items()), grid, 256, shared, parameters, tuning.early, True
    )


def _launch(
    kernel: str,
    defines: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    shared: int,
    numbers: tuple[int, ...],
    tuning: Tuning,
) -> nvrtc.Launch:
    parameters = struct.pack(f"<{len(numbers)}q", *numbers)
    return nvrtc.Launch(
        f"decode_{kernel}",
        _files(kernel),
        tuple(defines.items()),
        grid,
        threads,
        shared,
        parameters,
        tuning.early,
        True,
    )


def _files(kernel: str) -> tuple[Path, ...]:
    return (PRIMITIVES, *(KERNELS / f"{name}.cuh" for name in ("matrix", "numbers", kernel)))


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)
