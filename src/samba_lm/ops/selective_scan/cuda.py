"""The selective scan as CUDA C++ (``kernels/*.cuh``), compiled by NVRTC: launchers and custom operators."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samba_lm.ops import nvrtc
from samba_lm.ops.backend import HAS_TRITON

KERNELS = Path(__file__).parent / "kernels"
TILE = 16
"""Tokens that a block works on at once, ``T`` in common.cuh; the forward keeps the state before each tile."""
AHEAD = 4
"""As in common.cuh: tiles whose inputs are in shared memory."""
STATES = (8, 16, 32, 64)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of the inputs, and their number ``IO`` in common.cuh."""
SPAN_BYTES = 1 << 28
"""Memory for the backward's partial sums: as many tokens are done in one launch as fit."""
MAX_BATCH = 65535
"""Of a grid's second axis."""
FILL = 264
"""Blocks of 32 channels from which on an H100 (132 multiprocessors) is kept busy without halving them."""
MANY = 700
"""Blocks from which on two warps each are enough: 0.75 instead of 0.82 ms with 768 of them, but 0.73 instead of 0.64
with 576."""


class Shape(NamedTuple):
    """How the work is cut."""

    states: int
    """Of one thread."""
    channels: int
    """Of one block."""
    blocks: int = 0
    """Blocks that a multiprocessor must hold, which bounds the registers of a thread; 0: by the number of threads."""
    helpers: int = 0
    """``HELP`` in common.cuh: threads besides those that own states."""


SEGMENTS_SHAPE = Shape(4, 32, 5)


def forward_shape(batch: int, E: int, N: int) -> Shape:
    """Few blocks are halved, and helpers keep the owners of states at their work; many may be small."""
    blocks = batch * -(-E // 32)
    if blocks < FILL:
        return Shape(2, 16, 2, 64)
    return Shape(8, 32, max(1, 96 // N)) if blocks >= MANY else Shape(4, 32)


def backward_shape(batch: int, E: int, N: int) -> Shape:
    """Always 32 channels: the sums over them are a warp's."""
    if N == 64:  # then a block fills a multiprocessor, and helpers need less shared memory for inputs
        return Shape(4, 32, 1, 128)
    return Shape(4, 32, max(1, 3 * 16 // N)) if batch * -(-E // 32) >= FILL else Shape(4, 32, 1, 128)


def fits(u: torch.Tensor, N: int) -> bool:
    """Whether the kernels take these inputs: otherwise Triton's do."""
    if not (u.is_cuda and u.dtype in TYPES and N in STATES and 0 < u.shape[0] <= MAX_BATCH and u.shape[1] > 0):
        return False
    batch, _, E = u.shape
    forward = _forward_shared(N, forward_shape(batch, E, N), u.element_size(), True)
    backward = _backward_shared(N, backward_shape(batch, E, N), u.element_size(), True)
    return max(forward, backward) <= nvrtc.shared_limit(u.device)


def scan_cuda(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``scan_reference``; lengths int64 [B] instead of a padding mask.

    u, delta, B, C, z fp32, bf16 or fp16, any strides (read in fp32 where they differ in dtype); state None: zeros.
    Returns y in u's dtype and the final state in fp32. Backward gives the same bits every time.
    """
    A = A.float()
    D, delta_bias, state = (None if t is None else t.float() for t in (D, delta_bias, state))
    if u.shape[1] == 0:
        return torch.empty_like(u), A.new_zeros(u.shape[0], *A.shape) if state is None else state.clone()
    dtype = u.dtype
    if any(t is not None and t.dtype != dtype for t in (delta, B, C, z)):
        u, delta, B, C = (t.float() for t in (u, delta, B, C))
        z = None if z is None else z.float()
    tensors = (u, delta, A, B, C, D, z, delta_bias, state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final, _ = _forward(u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, save)
    return y.to(dtype), final


@torch.library.custom_op("samba_lm::selective_scan_cuda", mutates_args=())
def _forward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, L, E), N = u.shape, A.shape[1]
    segments = segments_of(batch, L, E, reverse=False)
    if segments > 1:
        A, delta_bias, resets, lengths = _plain(A, delta_bias, resets, lengths)
        u, delta, B, C, z, resets = cut(segments, u, delta, B, C, z, resets)
        lengths = cut_lengths(lengths, segments, L // segments)
        state = _forward_states(u, delta, A, B, delta_bias, state, resets, lengths, segments)
    launch, y, final, checkpoints, _keep = plan_forward(
        u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, save
    )
    nvrtc.launch(launch, u.device)
    if segments > 1:
        y, final = y.view(batch, L, E), final.unflatten(0, (batch, segments))[:, -1].clone()
        checkpoints = checkpoints.view(batch, -1, N, E) if save else checkpoints
    return y, final, checkpoints


def _forward_states(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    resets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    segments: int,
) -> torch.Tensor:
    """The state that each segment starts from."""
    u, delta, B = (_dense(t) for t in (u, delta, B))
    launch, local, steps, _keep = plan_segments(u, delta, A, B, None, delta_bias, resets, lengths, reverse=False)
    nvrtc.launch(launch, u.device)
    return entered(state, local, steps, A, segments, reverse=False)


def _plain(*tensors: Any) -> Any:
    return tuple(None if t is None else t.contiguous() for t in tensors)


@_forward.register_fake
def _(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, L, E), N = u.shape, A.shape[1]
    checkpoints = A.new_empty((batch, -(-L // TILE), N, E) if save else (0,))
    return u.new_empty(batch, L, E), A.new_empty(batch, E, N), checkpoints


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
    shape = shape or forward_shape(batch, E, N)
    u, delta, B, C = (_dense(t) for t in (u, delta, B, C))
    z = None if z is None else _dense(z)
    A = A.contiguous()
    D, delta_bias, state, resets, lengths = (
        None if t is None else t.contiguous() for t in (D, delta_bias, state, resets, lengths)
    )
    y, final = u.new_empty(batch, L, E), torch.empty(batch, E, N, device=u.device)
    checkpoints = final.new_empty((batch, -(-L // TILE), N, E) if save else (0,))
    rows = (u, delta, B, C, z)
    pointers = (*rows, A, D, delta_bias, state, resets, lengths, y, final, checkpoints)
    defines = {
        **_common(u, N, shape, rows),
        "GATED": z is not None,
        "RESETS": resets is not None,
        "SAVE": save,
        "BLOCKS": shape.blocks or max(1, 640 // threads(N, shape)),
    }
    launch = nvrtc.Launch(
        "scan_forward",
        files("forward"),
        tuple((name, int(value)) for name, value in defines.items()),
        (-(-E // shape.channels), batch),
        threads(N, shape),
        _forward_shared(N, shape, u.element_size(), z is not None),
        pack(*(0 if t is None else t.data_ptr() for t in pointers), L, E, *_strides(*rows)),
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
    x, delta, w = x[row], delta[row], w[row]
    z, resets, lengths = (None if t is None else t[row] for t in (z, resets, lengths))
    rows = (x, delta, w, z)
    batch = x.shape[0]
    pointers = (*rows, A, delta_bias, resets, lengths, local[row], steps[row])
    defines = {
        **_common(x, N, shape, rows),
        "GATED": z is not None,
        "RESETS": resets is not None,
        "REVERSE": reverse,
        "BLOCKS": shape.blocks,
    }
    inputs = _inputs(N, shape, x.element_size(), 3 if z is not None else 2, z is not None, weights=1)
    launch = nvrtc.Launch(
        "scan_segments",
        files("segments"),
        tuple((name, int(value)) for name, value in defines.items()),
        (-(-E // shape.channels), batch),
        threads(N, shape),
        2 * 4 * TILE * (2 * shape.channels + N) + inputs,
        pack(*(0 if t is None else t.data_ptr() for t in pointers), L, E, *_strides(*rows)),
    )
    return launch, local, steps, [*pointers]


def segments_of(batch: int, L: int, E: int, *, reverse: bool) -> int:
    """Into how many segments of equal length, multiples of TILE, a row is cut so that its blocks fill the GPU.

    From measurements on an H100. A pass forwards costs little more than what finds the segments' effects, so it is cut
    only where most of the GPU would be idle; backwards that is a fifth.
    """
    blocks = batch * -(-E // 32)
    if reverse:
        wanted = min(1024 // blocks, L // 512) if blocks < FILL and HAS_TRITON else 1
    else:
        wanted = min(512 // blocks, L // 2048) if blocks < FILL // 4 and HAS_TRITON else 1
    return next((n for n in range(wanted, 1, -1) if L % (n * TILE) == 0), 1)


def cut(segments: int, *tensors: torch.Tensor | None) -> Any:
    """Each [B, L, ...] as [B * segments, L / segments, ...], views where the batch's rows follow each other."""
    return [None if t is None else t.unflatten(1, (segments, -1)).flatten(0, 1) for t in tensors]


def needed(segments: int, rows: int, reverse: bool) -> slice:
    """The segments whose effect another one waits for: of a single row all but the last one taken."""
    if rows != segments:
        return slice(None)
    return slice(1, None) if reverse else slice(0, -1)


def cut_lengths(lengths: torch.Tensor | None, segments: int, span: int) -> torch.Tensor | None:
    """The number of valid tokens in each segment."""
    if lengths is None:
        return None
    starts = torch.arange(segments, device=lengths.device) * span
    return (lengths[:, None] - starts).clamp(0, span).flatten()


def entered(
    first: torch.Tensor | None, local: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, segments: int, reverse: bool
) -> torch.Tensor:
    """What each segment is entered with, [B * segments, E, N]: ``first`` [B, E, N] (None: zeros) by the first of them,
    in reverse by the last. local, steps: of all the segments, see ``plan_segments``."""
    from samba_lm.ops.selective_scan.triton import chain  # NVRTC comes with builds of PyTorch that bring Triton too

    local, steps = local.unflatten(0, (-1, segments)), steps.unflatten(0, (-1, segments))
    first = torch.zeros_like(local[:, 0]) if first is None else first.contiguous()
    return chain(local, steps, A, first, reverse=reverse).flatten(0, 1)


def files(kernel: str) -> tuple[Path, ...]:
    return tuple(KERNELS / f"{name}.cuh" for name in ("primitives", "common", kernel))


def threads(N: int, shape: Shape) -> int:
    """Of a block."""
    return _owners(N, shape) + shape.helpers


def _owners(N: int, shape: Shape) -> int:
    return shape.channels * N // shape.states


def pack(*values: int) -> bytes:
    """A kernel's parameter: pointers and 64-bit numbers."""
    return struct.pack(f"<{len(values)}q", *values)


def _forward_shared(N: int, shape: Shape, element: int, gated: bool) -> int:
    """Bytes of ``ForwardShared`` in forward.cuh."""
    part_row = _owners(N, shape) + (16 if shape.channels == 16 else 0)
    tile = 4 * TILE * (2 * shape.channels + 2 * N + part_row)
    return 2 * tile + _inputs(N, shape, element, 3 if gated else 2, gated)


def _inputs(N: int, shape: Shape, element: int, tensors: int, gated: bool, weights: int = 2) -> int:
    """Bytes of ``AHEAD`` tiles' inputs: pairs for each thread, of ``tensors`` with E columns and ``weights`` with N."""
    workers = shape.helpers or _owners(N, shape)
    rounds, bc_rounds = (-(-TILE * width // 2 // workers) for width in (shape.channels, N))
    return AHEAD * workers * 2 * element * (tensors * rounds + (0 if gated else 1) + weights * bc_rounds)


def _common(u: torch.Tensor, N: int, shape: Shape, rows: tuple[torch.Tensor | None, ...]) -> dict[str, int]:
    """The macros of common.cuh."""
    cut = {"S": shape.states, "CH": shape.channels, "HELP": shape.helpers}
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


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


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


@torch.library.custom_op("samba_lm::selective_scan_cuda_backward", mutates_args=())
def _backward(
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
) -> list[torch.Tensor]:
    batch, L, E = u.shape
    segments = segments_of(batch, L, E, reverse=True)
    if segments > 1:
        A, delta_bias, resets, lengths = _plain(A, delta_bias, resets, lengths)
        dy, u, delta, B, C, z, resets, checkpoints = cut(segments, dy, u, delta, B, C, z, resets, checkpoints)
        dy, delta, C = (_dense(t) for t in (dy, delta, C))
        z = None if z is None else _dense(z)
        lengths = cut_lengths(lengths, segments, L // segments)
        launch, local, steps, _inputs = plan_segments(dy, delta, A, C, z, delta_bias, resets, lengths, reverse=True)
        nvrtc.launch(launch, u.device)
        dfinal = entered(dfinal, local, steps, A, segments, reverse=True)
    launches, grads, _keep = plan_backward(
        dy, dfinal, u, delta, A, B, C, D, z, delta_bias, resets, lengths, checkpoints
    )
    for each in launches:
        nvrtc.launch(each, u.device)
    return [*_whole(_summed(grads), batch, segments)]


@_backward.register_fake
def _(
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
) -> list[torch.Tensor]:
    (batch, L, E), N = u.shape, A.shape[1]
    like_u, like_B = (u.new_empty(batch, L, width) for width in (E, N))
    dz = u.new_empty((batch, L, E) if z is not None else (0,))
    dD, dbias = A.new_empty(E), A.new_empty(E)
    dstate = A.new_empty(batch, E, N)
    return [like_u, like_u.clone(), A.new_empty(E, N), like_B, like_B.clone(), dD, dz, dbias, dstate]


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

    A, D and delta_bias have one gradient for each row of the batch yet, see ``_summed``. The partial sums of dB and dC
    are made and summed for ``span_bytes`` at once, so that they stay in the GPU's cache.
    """
    (batch, L, E), N = u.shape, A.shape[1]
    shape = shape or backward_shape(batch, E, N)
    dy, u, delta, B, C = (_dense(t) for t in (dy, u, delta, B, C))
    z = None if z is None else _dense(z)
    A = A.contiguous()
    dfinal, D, delta_bias, resets, lengths = (
        None if t is None else t.contiguous() for t in (dfinal, D, delta_bias, resets, lengths)
    )
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
    blocks, tiles = -(-E // shape.channels), -(-L // TILE)
    tile_bytes = blocks * batch * TILE * 2 * N * 4
    span = min(tiles, max(1, span_bytes // tile_bytes))
    partial = A.new_empty(blocks, batch, span * TILE, 2 * N)
    rows = (dy, u, delta, B, C, z)
    defines = {
        **_common(u, N, shape, rows),
        "GATED": z is not None,
        "RESETS": resets is not None,
        "KEEP": shape.states == 2 or (shape.helpers > 0 and threads(N, shape) <= 256),
        "BLOCKS": shape.blocks or 1,
    }
    macros = tuple((name, int(value)) for name, value in defines.items())
    results = (grads.u, grads.delta, grads.z, grads.state, grads.A, grads.D, grads.delta_bias, partial)
    pointers = (*rows, A, D, delta_bias, resets, lengths, checkpoints, dfinal, *results)
    addresses = [0 if t is None else t.data_ptr() for t in pointers]
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
                _backward_shared(N, shape, u.element_size(), z is not None),
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


def _summed(grads: Grads) -> Grads:
    """The gradients, with those of A, D and delta_bias summed over the batch."""
    dA, dD, dbias = (t.sum(0) for t in (grads.A, grads.D, grads.delta_bias))
    return grads._replace(A=dA, D=dD, delta_bias=dbias)


def _whole(grads: Grads, batch: int, segments: int) -> Grads:
    """The gradients of segments as those of rows; the state's is the first segment's."""
    if segments == 1:
        return grads
    rows = {
        name: getattr(grads, name).unflatten(0, (batch, segments)).flatten(1, 2)
        for name in ("u", "delta", "B", "C", "z")
        if getattr(grads, name).numel()
    }
    return grads._replace(**rows, state=grads.state.unflatten(0, (batch, segments))[:, 0].clone())


def _backward_shared(N: int, shape: Shape, element: int, gated: bool) -> int:
    """Bytes of ``BackwardShared`` in backward.cuh."""
    elements = TILE * shape.channels
    tile = 4 * (elements * (2 + 1 + 2) + TILE * 2 * N)
    sums = 4 * (elements * N // shape.states * 3 + TILE * 2 * N)
    return 2 * tile + sums + _inputs(N, shape, element, 4 if gated else 3, gated)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:11], output[2])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, dy: torch.Tensor | None, dfinal: torch.Tensor | None, _checkpoints: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u, memory_format=torch.contiguous_format)
    grads = Grads(*_backward(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, resets, lengths, checkpoints))
    given = (u, delta, A, B, C, D, z, delta_bias, state)
    return *(None if t is None else g for t, g in zip(given, grads, strict=True)), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
