"""The selective scan on the GPU: launches, and the registration that autograd and torch.compile see.

A row whose batch and channels do not fill the GPU is cut into segments of time. They run at once: a first pass finds
what each does to a state, a short chain gives every segment the state that it starts from. The backward pass does the
same in reverse with the gradient of the state. No sum depends on the order in which programs finish.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="misc, assignment"
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from samba_lm.ops.backend import INTERPRETED, differentiable
from samba_lm.ops.selective_scan.triton_backward import carry_kernel, scan_backward_kernel
from samba_lm.ops.selective_scan.triton_forward import chain_kernel, scan_kernel, summary_kernel
from samba_lm.ops.shapes import last_dense

TILE = 16
"""Tokens between two kept states. Backward needs them: 4 bytes a token and channel for N = 16."""
SUB = 8
"""Tokens whose states backward holds in registers at once."""
ENOUGH_LANES = 24_576
"""Rows times channels that fill a GPU without cutting time into segments."""
CHAIN_BLOCK = 256


def scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``scan_reference`` for CUDA tensors of 32 bits or fewer; ``lengths`` int64 [B] instead of a padding mask."""
    everything = (u, delta, A, B, C, D, z, delta_bias, state)
    keep = differentiable(*everything)
    y, final, _ = scan_forward(u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, keep)
    return y, final


@torch.library.custom_op("samba_lm::selective_scan", mutates_args=())
def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, L, E], the final state [B, E, N], and if ``keep`` the states before every tile [B, tiles, E, N]."""
    batch, length, channels = u.shape
    n = A.shape[1]
    u, delta, B, C = (last_dense(t) for t in (u, delta, B, C))
    z = None if z is None else last_dense(z)
    A, D, bias, state = A.contiguous(), _vector(D, A), _vector(delta_bias, A), state.contiguous()
    resets, lengths = (None if t is None else t.contiguous() for t in (resets, lengths))
    y = torch.empty(batch, length, channels, dtype=u.dtype, device=u.device)
    final = torch.empty_like(state)
    tiles = triton.cdiv(length, TILE)
    checkpoints = torch.empty(batch, tiles if keep else 0, channels, n, dtype=torch.float32, device=u.device)
    span, segments = segments_of(batch, length, channels)
    start = state
    if segments > 1:
        start = _chained(u, delta, A, B, bias, state, resets, lengths, span, segments)
    block, warps = _block(n)
    with torch.cuda.device_of(u):
        scan_kernel[(triton.cdiv(channels, block), batch, segments)](
            u, delta, A, B, C, D, z, bias, start, resets, lengths, y, final, checkpoints,
            length, span, segments, tiles, *_batch_strides(u, delta, z, B, C),
            **_row_strides(u=u, delta=delta, z=z, B=B, C=C), E=channels, BE=block, N=n, TILE=TILE,
            HAS_Z=z is not None, HAS_RESETS=resets is not None,
            HAS_LENGTHS=lengths is not None, KEEP=keep, enable_fp_fusion=True, num_warps=warps,
        )  # fmt: skip
    return y, final, checkpoints


@scan_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, state, resets, lengths, keep):
    tiles = (u.shape[1] + TILE - 1) // TILE if keep else 0
    shape = (u.shape[0], tiles, u.shape[2], A.shape[1])
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return y, torch.empty(state.shape, device=u.device), torch.empty(shape, device=u.device)


@torch.library.custom_op("samba_lm::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    resets: Tensor | None,
    lengths: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and state; empty for z where there is none."""
    batch, length, channels = u.shape
    n = A.shape[1]
    u, delta, B, C, dy = (last_dense(t) for t in (u, delta, B, C, dy))
    z = None if z is None else last_dense(z)
    A, D, bias = A.contiguous(), _vector(D, A), _vector(delta_bias, A)
    resets, lengths = (None if t is None else t.contiguous() for t in (resets, lengths))
    dfinal = A.new_zeros(batch, channels, n) if dfinal is None else dfinal.contiguous()
    span, segments = segments_of(batch, length, channels)
    options: dict[str, Any] = {
        "HAS_Z": z is not None,
        "HAS_RESETS": resets is not None,
        "HAS_LENGTHS": lengths is not None,
    }
    carries = dfinal
    if segments > 1:
        block, warps = _block(n)
        local = A.new_empty(batch, segments, channels, n)
        steps = A.new_empty(batch, segments, channels)
        with torch.cuda.device_of(u):
            carry_kernel[(triton.cdiv(channels, block), batch, segments)](
                delta, A, C, z, bias, resets, lengths, dy, local, steps,
                length, span, segments, *_batch_strides(delta, z, C, dy),
                **_row_strides(delta=delta, z=z, C=C, dy=dy), E=channels, BE=block, N=n, **options,
                enable_fp_fusion=True, num_warps=warps,
            )  # fmt: skip
        carries = chain(local, steps, A, dfinal, reverse=True)
    block, warps, group = _backward_block(n)
    blocks = triton.cdiv(channels, block)
    du, ddelta = (torch.empty(batch, length, channels, dtype=t.dtype, device=t.device) for t in (u, delta))
    dz = u.new_empty(0) if z is None else torch.empty(batch, length, channels, dtype=z.dtype, device=z.device)
    dA = A.new_empty(batch * segments, channels, n)
    dD, dbias = A.new_empty(batch * segments, channels), A.new_empty(batch * segments, channels)
    dstate = torch.empty_like(dfinal)
    dBC = A.new_empty(blocks, batch, length, 2, n)
    with torch.cuda.device_of(u):
        scan_backward_kernel[(blocks, batch, segments)](
            u, delta, A, B, C, D, z, bias, resets, lengths, checkpoints, dy, carries,
            du, ddelta, dz, dA, dD, dbias, dstate, dBC,
            length, span, segments, checkpoints.shape[1], batch, *_batch_strides(u, delta, z, B, C, dy),
            **_row_strides(u=u, delta=delta, z=z, B=B, C=C, dy=dy), E=channels,
            BE=block, N=n, TILE=TILE, SUB=SUB, GROUP=group, PRECISION="ieee" if u.dtype == torch.float32 else "tf32",
            **options, enable_fp_fusion=True, num_warps=warps, **_registers(168),
        )  # fmt: skip
    dB, dC = (dBC[:, :, :, i].sum(0) for i in (0, 1))
    return du, ddelta, dA.sum(0), dB.to(B.dtype), dC.to(C.dtype), dD.sum(0), dz, dbias.sum(0), dstate


@scan_backward.register_fake
def _(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, resets, lengths, checkpoints):
    def like(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    dstate = A.new_empty(u.shape[0], u.shape[2], A.shape[1])
    dz = u.new_empty(0) if z is None else like(z)
    return (
        like(u), like(delta), like(A), like(B), like(C), A.new_empty(A.shape[0]), dz, A.new_empty(A.shape[0]), dstate
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, D, z, delta_bias, _state, resets, lengths, _ = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, resets, lengths, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias, resets, lengths, checkpoints = ctx.saved_tensors
    if dy is None and dfinal is None:
        return (None,) * 12
    dy = torch.zeros_like(u) if dy is None else dy
    du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = scan_backward(
        dy, dfinal, u, delta, A, B, C, D, z, delta_bias, resets, lengths, checkpoints
    )
    return (
        du, ddelta, dA, dB, dC, None if D is None else dD, None if z is None else dz,
        None if delta_bias is None else dbias, dstate, None, None, None,
    )  # fmt: skip


scan_forward.register_autograd(_backward, setup_context=_setup)


def segments_of(batch: int, length: int, channels: int) -> tuple[int, int]:
    """(tokens, number) of the segments of time: one, or as many as fill the GPU. Tokens are a multiple of TILE."""
    wanted = max(1, min(ENOUGH_LANES // (batch * channels), triton.cdiv(length, 8 * TILE)))
    span = triton.cdiv(triton.cdiv(length, wanted), TILE) * TILE
    return span, triton.cdiv(length, span)


def _chained(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Tensor, state: Tensor,
    resets: Tensor | None, lengths: Tensor | None, span: int, segments: int,
) -> Tensor:  # fmt: skip
    """The states at the segments' starts [B, segments, E, N]."""
    batch, length, channels = u.shape
    n = A.shape[1]
    block, warps = _block(n)
    local = A.new_empty(batch, segments, channels, n)
    steps = A.new_empty(batch, segments, channels)
    with torch.cuda.device_of(u):
        summary_kernel[(triton.cdiv(channels, block), batch, segments)](
            u, delta, A, B, bias, resets, lengths, local, steps,
            length, span, segments, *_batch_strides(u, delta, B),
            **_row_strides(u=u, delta=delta, B=B), E=channels, BE=block, N=n,
            HAS_RESETS=resets is not None, HAS_LENGTHS=lengths is not None, enable_fp_fusion=True, num_warps=warps,
        )  # fmt: skip
    return chain(local, steps, A, state, reverse=False)


def chain(local: Tensor, steps: Tensor, A: Tensor, begin: Tensor, *, reverse: bool) -> Tensor:
    """What each segment is entered with [B, segments, E, N]: see ``chain_kernel``."""
    batch, segments, channels, n = local.shape
    out = torch.empty_like(local)
    cells = channels * n
    with torch.cuda.device_of(local):
        chain_kernel[(triton.cdiv(cells, CHAIN_BLOCK), batch)](
            local,
            steps,
            A,
            begin,
            out,
            cells,
            segments,
            N=n,
            BLOCK=CHAIN_BLOCK,
            REVERSE=reverse,
            enable_fp_fusion=True,
        )
    return out


def _block(n: int) -> tuple[int, int]:
    """Channels of a forward program and its warps: eight states a lane."""
    return max(16, 1024 // n), 4


def _backward_block(n: int) -> tuple[int, int, int]:
    """Channels of a backward program, its warps, and the tokens whose channel sums share a product."""
    return max(16, 1024 // n), 4, 2 if n <= 16 else 1


def _registers(most: int) -> dict[str, int]:
    """Launch options that cap the registers a lane, for three programs a multiprocessor where two would fit."""
    return {} if INTERPRETED or torch.version.cuda is None else {"maxnreg": most}


def _vector(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[0]) if t is None else t.contiguous()


def _batch_strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]


def _row_strides(**tensors: Tensor | None) -> dict[str, int]:
    """Compiled in, as E is: they belong to the model, not to the text, and make every address a constant apart."""
    return {f"{name}_row": 0 if t is None else t.stride(1) for name, t in tensors.items()}
