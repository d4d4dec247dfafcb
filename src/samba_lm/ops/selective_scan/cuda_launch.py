"""How the selective scan's CUDA kernels are launched: the shapes of blocks, the macros, memory and parameters."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samba_lm.ops import nvrtc
from samba_lm.ops.backend import HAS_TRITON
from samba_lm.ops.shapes import last_dense

KERNELS = Path(__file__).parent / "kernels"
CHANNELS = 32
"""Of a block."""
TILE = 16
"""Tokens that a block works on at once, and from one state that the forward keeps to the next."""
AHEAD = 4
"""As in common.cuh: tiles whose inputs are in shared memory."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of the inputs, and their number ``IO`` in common.cuh."""
SPAN_BYTES = 1 << 28
"""Memory for the backward's partial sums: as many tokens are done in one launch as fit. Fewer launches are faster, by
1.5 % with twice the memory and by 4 % from a quarter of it, on an H100."""
FILL = 264
"""Blocks from which on they keep an H100 (132 multiprocessors) busy by their number: with fewer, helpers let the owners
of states do nothing else."""
MANY = 700
"""Blocks from which on two warps each are enough in the forward: of the 768 of batch 8, E 3072 six fit where four of
twice the warps do."""
SMALL_SHARED = 99 * 1024
"""Bytes of shared memory that a block may have on every GPU that the kernels run on."""


class Shape(NamedTuple):
    """How the work is cut."""

    states: int
    """Of one thread."""
    blocks: int = 1
    """Blocks that a multiprocessor must hold, which bounds the registers of a thread."""
    helpers: int = 0
    """``HELP`` in common.cuh: threads besides those that own states; the backward wants some."""
    tokens: int = TILE
    """Of a tile: more than ``TILE`` only in the forward."""
    stage: int = 2
    """``STAGE`` in forward.cuh: tokens that an owner of states loads at once; in the backward always 8 / states."""


SEGMENTS_SHAPE = Shape(4, 5)


def forward_shape(batch: int, E: int, N: int, element: int) -> Shape:
    """The more blocks, the fewer warps each needs; few blocks get helpers, and long tiles where those fit."""
    blocks = batch * -(-E // CHANNELS)
    if blocks >= FILL:
        return Shape(8, max(1, 96 // N)) if blocks >= MANY else Shape(4, max(1, 64 // N), stage=4)
    longer = Shape(4, 1, 128, 2 * TILE)
    fits = forward_shared(N, longer, element, True) <= SMALL_SHARED
    return longer if fits else longer._replace(tokens=TILE)


def backward_shape(batch: int, E: int, N: int) -> Shape:
    """Always with helpers, so that owners of states wait for nothing but the states before: few blocks, each alone on
    its multiprocessor, get many; many blocks share multiprocessors, as far as registers and shared memory go.

    In bf16 and N 16 a block fits ``SMALL_SHARED``. In fp32 it does not: GPUs with no more take Triton's kernels there.
    """
    if N > 16 or batch * -(-E // CHANNELS) < FILL:
        return Shape(4, 1, 128)
    return Shape(4, 2, 64) if N == 16 else Shape(4, 3, 32)


def plan_forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    save: bool,
    shape: Shape | None = None,
) -> tuple[nvrtc.Launch, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """The launch, its results (y, final state, checkpoints) and the inputs that must outlive it."""
    (batch, L, E), N = u.shape, A.shape[1]
    shape = shape or forward_shape(batch, E, N, u.element_size())
    rows = u, delta, B, C, z = readable(u, delta, B, C, z)
    A, D, delta_bias, state, resets, lengths = contiguous(A, D, delta_bias, state, resets, lengths)
    y, final = u.new_empty(batch, L, E), torch.empty(batch, E, N, device=u.device)
    checkpoints = final.new_empty((batch, -(-L // TILE), N, E) if save else (0,))
    pointers = (*rows, A, D, delta_bias, state, resets, lengths, y, final, checkpoints)
    defines = {
        **_common(u, N, shape, rows),
        "GATED": z is not None,
        "RESETS": resets is not None,
        "SAVE": save,
        "STAGE": shape.stage,
    }
    launch = nvrtc.Launch(
        "scan_forward",
        files("forward"),
        _macros(defines),
        (-(-E // CHANNELS), batch),
        threads(N, shape),
        forward_shared(N, shape, u.element_size(), z is not None),
        pack(*_addresses(pointers), L, E, *_strides(*rows)),
    )
    return launch, y, final, checkpoints, [*pointers]


def plan_segments(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    w: torch.Tensor,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    *,
    reverse: bool,
    row: slice = slice(None),
    shape: Shape = SEGMENTS_SHAPE,
) -> tuple[nvrtc.Launch, torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """The launch that finds what each row of the batch does to a state (x = u, w = B) or, in reverse, to a state's
    gradient (x = dy, w = C, z): its results local [B, E, N] and steps [B, E], and the inputs that must outlive it.
    Only those of the rows ``row`` are written."""
    (_, L, E), N = x.shape, A.shape[1]
    local, steps = A.new_empty(x.shape[0], E, N), A.new_empty(x.shape[0], E)
    rows = x, delta, w, z = readable(*(None if t is None else t[row] for t in (x, delta, w, z)))
    resets, lengths = contiguous(*(None if t is None else t[row] for t in (resets, lengths)))
    A, delta_bias = contiguous(A, delta_bias)
    batch = x.shape[0]
    pointers = (*rows, A, delta_bias, resets, lengths, local[row], steps[row])
    defines = {
        **_common(x, N, shape, rows),
        "GATED": z is not None,
        "RESETS": resets is not None,
        "REVERSE": reverse,
    }
    prefetched = input_bytes(N, shape, x.element_size(), 3 if z is not None else 2, z is not None, weights=1)
    launch = nvrtc.Launch(
        "scan_segments",
        files("segments"),
        _macros(defines),
        (-(-E // CHANNELS), batch),
        threads(N, shape),
        2 * 4 * TILE * (2 * CHANNELS + N) + prefetched,
        pack(*_addresses(pointers), L, E, *_strides(*rows)),
    )
    return launch, local, steps, [*pointers]


def segments_of(batch: int, L: int, E: int, *, reverse: bool) -> int:
    """Into how many segments of equal length, multiples of TILE, a row is cut so that its blocks fill the GPU.

    What finds the segments' effects costs about as much as a pass forwards, and a fifth of one backwards; so a row is
    cut only where most of the GPU would idle. On an H100 the 128 blocks of a row of 131,072 tokens and E 4096 go back
    in 13.8 ms whole, and in 14.6 ms or more in 2, 4 or 8 segments.
    """
    blocks = batch * -(-E // CHANNELS)
    if blocks >= FILL // 4 or not HAS_TRITON:
        return 1
    wanted = min(1024 // blocks, L // 512) if reverse else min(512 // blocks, L // 2048)
    return next((n for n in range(wanted, 1, -1) if L % (n * TILE) == 0), 1)


def files(kernel: str) -> tuple[Path, ...]:
    return tuple(KERNELS / f"{name}.cuh" for name in ("primitives", "common", kernel))


def threads(N: int, shape: Shape) -> int:
    """Of a block."""
    return _owners(N, shape) + shape.helpers


def _owners(N: int, shape: Shape) -> int:
    return CHANNELS * N // shape.states


def pack(*values: int) -> bytes:
    """A kernel's parameter: pointers and 64-bit numbers."""
    return struct.pack(f"<{len(values)}q", *values)


def forward_shared(N: int, shape: Shape, element: int, gated: bool) -> int:
    """Bytes of ``ForwardShared`` in forward.cuh."""
    tile = 4 * shape.tokens * (2 * CHANNELS + 2 * N + _owners(N, shape))
    return 2 * tile + input_bytes(N, shape, element, 3 if gated else 2, gated)


def input_bytes(N: int, shape: Shape, element: int, tensors: int, gated: bool, weights: int = 2) -> int:
    """Bytes of ``AHEAD`` tiles' inputs: pairs for each thread, of ``tensors`` with E columns and ``weights`` with N."""
    workers = shape.helpers or _owners(N, shape)
    rounds, bc_rounds = (-(-shape.tokens * width // 2 // workers) for width in (CHANNELS, N))
    return AHEAD * workers * 2 * element * (tensors * rounds + (0 if gated else 1) + weights * bc_rounds)


def _common(u: torch.Tensor, N: int, shape: Shape, rows: tuple[torch.Tensor | None, ...]) -> dict[str, int]:
    """The macros of common.cuh."""
    cut = {"S": shape.states, "BLOCKS": shape.blocks, "HELP": shape.helpers, "TOKENS": shape.tokens}
    return {"IO": TYPES[u.dtype], "N": N, **cut, "WIDE": int(_wide(u.shape[2], rows))}


def _wide(E: int, rows: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether pairs of neighbours may be read at once: E even, and every row starts at a multiple of two elements."""
    return E % 2 == 0 and all(
        t is None or (t.data_ptr() % (2 * t.element_size()) == 0 and all(s % 2 == 0 or n == 1 for s, n in _outer(t)))
        for t in rows
    )


def _outer(t: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(t.stride()[:2], t.shape[:2], strict=True))


def _strides(*rows: torch.Tensor | None) -> tuple[int, ...]:
    """Batch and row stride of each."""
    return tuple(s for t in rows for s in ((0, 0) if t is None else t.stride()[:2]))


def readable(*rows: torch.Tensor | None) -> Any:
    """What has one row a token, as the kernels read it."""
    return tuple(None if t is None else last_dense(t) for t in rows)


def contiguous(*tensors: torch.Tensor | None) -> Any:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _macros(defines: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, value in defines.items())


def _addresses(tensors: Iterable[torch.Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


class Grads(NamedTuple):
    """Gradients of ``scan_cuda``'s inputs; those of tensors that were None are empty."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    z: torch.Tensor
    delta_bias: torch.Tensor
    state: torch.Tensor


def plan_backward(
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    checkpoints: torch.Tensor,
    shape: Shape | None = None,
    span_bytes: int = SPAN_BYTES,
) -> tuple[list[nvrtc.Launch], Grads, list[torch.Tensor | None]]:
    """The launches, in order, their results and the tensors that must outlive them.

    A, D and delta_bias have one gradient for each row of the batch yet, see ``summed``. The partial sums of dB and dC
    are made and summed for ``span_bytes`` at once.
    """
    (batch, L, E), N = u.shape, A.shape[1]
    shape = shape or backward_shape(batch, E, N)
    rows = dy, u, delta, B, C, z = readable(dy, u, delta, B, C, z)
    A, dfinal, D, delta_bias, resets, lengths = contiguous(A, dfinal, D, delta_bias, resets, lengths)
    grads = Grads(
        u.new_empty(batch, L, E),
        u.new_empty(batch, L, E),
        A.new_empty(batch, E, N),
        u.new_empty(batch, L, N),
        u.new_empty(batch, L, N),
        A.new_empty(batch, E),
        u.new_empty((batch, L, E) if z is not None else (0,)),
        A.new_empty(batch, E),
        A.new_empty(batch, E, N),
    )
    blocks, tiles = -(-E // CHANNELS), -(-L // TILE)
    tile_bytes = blocks * batch * TILE * 2 * N * 4
    span = min(tiles, max(1, span_bytes // tile_bytes))
    partial = A.new_empty(blocks, batch, span * TILE, 2 * N)
    defines = {
        **_common(u, N, shape, rows),
        "GATED": z is not None,
        "RESETS": resets is not None,
        "KEEP": threads(N, shape) * shape.blocks <= 256,
    }
    macros = _macros(defines)
    results = (grads.u, grads.delta, grads.z, grads.state, grads.A, grads.D, grads.delta_bias, partial)
    pointers = (*rows, A, D, delta_bias, resets, lengths, checkpoints, dfinal, *results)
    addresses = _addresses(pointers)
    launches = []
    for end in range(tiles, 0, -span):
        first = max(0, end - span)
        launches.append(
            nvrtc.Launch(
                "scan_backward",
                files("backward"),
                macros,
                (blocks, batch),
                threads(N, shape),
                backward_shared(N, shape, u.element_size(), z is not None),
                pack(*addresses, L, E, first, end, *_strides(*rows)),
            )
        )
        count = (end - first) * TILE
        sizes = (blocks, batch, count, first * TILE, L)
        launches.append(
            nvrtc.Launch(
                "sum_partials",
                files("backward"),
                macros,
                (-(-count * N // 512), batch),
                256,
                0,
                pack(partial.data_ptr(), grads.B.data_ptr(), grads.C.data_ptr(), *sizes),
            )
        )
    return launches, grads, [*pointers]


def summed(grads: Grads) -> Grads:
    """The gradients, with those of A, D and delta_bias summed over the batch."""
    dA, dD, dbias = (t.sum(0) for t in (grads.A, grads.D, grads.delta_bias))
    return grads._replace(A=dA, D=dD, delta_bias=dbias)


def backward_shared(N: int, shape: Shape, element: int, gated: bool) -> int:
    """Bytes of ``BackwardShared`` in backward.cuh."""
    elements = TILE * CHANNELS
    tile = 4 * (elements * (2 + 1 + 2) + TILE * 2 * N)
    sums = 4 * (elements * N // shape.states * 3 + TILE * 2 * N)
    return 3 * tile + sums + input_bytes(N, shape, element, 4 if gated else 3, gated)
