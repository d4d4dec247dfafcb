"""The short convolution on Triton: launchers and custom operators, forward and backward."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from samba_lm.ops.causal_conv1d.triton_kernels import backward_kernel, forward_kernel
from samba_lm.ops.shapes import last_dense

MAX_SEGMENTS = 65535  # of a grid's second axis
MIN_PROGRAMS = 2048  # about 16 a multiprocessor of an H100
MIN_ROWS = 16


class Config(NamedTuple):
    """How a kernel is cut."""

    rows: int
    """Of a segment, a multiple of ``unroll``."""
    unroll: int
    """Rows loaded at once."""
    registers: int | None = 255
    """At most so many a thread; None leaves it to the compiler, which then spares more of them than under 255."""


def forward_config(B: int, L: int, E: int) -> Config:
    return _fit(Config(rows=128, unroll=8), B, L, E)


def backward_config(B: int, L: int, E: int, roomy: bool) -> Config:
    """``roomy``: four rows ahead fit into 128 registers, which leave enough warps to hide the memory's latency."""
    config = Config(rows=128, unroll=4, registers=128) if roomy else Config(rows=128, unroll=2)
    return _fit(config, B, L, E)


def _fit(config: Config, B: int, L: int, E: int) -> Config:
    """``config`` for too little work to fill the GPU with long segments, and for very long rows."""
    rows = config.rows
    while rows > MIN_ROWS and B * triton.cdiv(E, _block(E)) * triton.cdiv(L, rows) < MIN_PROGRAMS:
        rows //= 2
    while triton.cdiv(L, rows) > MAX_SEGMENTS:
        rows *= 2
    return config._replace(rows=rows)


def _block(E: int) -> int:
    """Channels a program, of one warp: four a lane, since with eight too few warps would have registers enough."""
    return min(128, max(32, triton.next_power_of_2(E)))


def conv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``causal_conv1d``; the state in x's dtype, or None for zeros.

    x may be a view whose last dimension is dense (half of a projection's output), which is read where it is.
    """
    return _conv(x, weight, bias, state, positions, lengths)


@torch.library.custom_op("samba_lm::causal_conv1d", mutates_args=())
def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(x):
        return launch_forward(x, weight, bias, state, positions, lengths)


@_conv.register_fake
def _(x, weight, bias, state, positions, lengths):
    B, L, E = x.shape
    return x.new_empty(B, L, E), x.new_empty(B, weight.shape[1] - 1, E)


def launch_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, L, E] and the final state [B, k-1, E]; ``config`` None: chosen by shape."""
    (B, L, E), k = x.shape, weight.shape[1]
    x = last_dense(x)
    y, final = x.new_empty(B, L, E), x.new_empty(B, k - 1, E)
    if L == 0:
        return y, final.zero_() if state is None else final.copy_(state)
    config = config or forward_config(B, L, E)
    forward_kernel[_grid(B, L, E, config)](
        x,
        weight.contiguous(),
        _or(bias, weight),
        _or(state, x),
        _or(positions, x),
        _or(lengths, x),
        y,
        final,
        L,
        E,
        config.rows,
        x.stride(0),
        x.stride(1),
        _position_stride(positions, L),
        K=k,
        HAS_BIAS=bias is not None,
        HAS_STATE=state is not None,
        HAS_POSITIONS=positions is not None,
        HAS_LENGTHS=lengths is not None,
        BLOCK=_block(E),
        UNROLL=config.unroll,
        enable_fp_fusion=True,
        num_warps=1,
        maxnreg=config.registers,
        num_stages=1,
    )
    return y, final


@torch.library.custom_op("samba_lm::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    with_dstate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(x):
        return launch_backward(dy, dfinal, x, weight, bias, state, positions, lengths, with_dstate)


@_conv_backward.register_fake
def _(dy, dfinal, x, weight, bias, state, positions, lengths, with_dstate):
    (B, L, E), k = x.shape, weight.shape[1]
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(E)
    return x.new_empty(B, L, E), weight.new_empty(E, k), dbias, x.new_empty(B, k - 1 if with_dstate else 0, E)


def launch_backward(
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    with_dstate: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx [B, L, E], dweight [E, k], dbias [E] and dstate [B, k-1, E]; the last two empty where there is none."""
    (B, L, E), k = x.shape, weight.shape[1]
    x, dy = last_dense(x), last_dense(dy)
    dx = x.new_empty(B, L, E)
    dstate = x.new_empty(B, k - 1 if with_dstate else 0, E)
    if L == 0:
        if with_dstate:
            dstate.zero_() if dfinal is None else dstate.copy_(dfinal)
        return dx, torch.zeros_like(weight), weight.new_empty(0) if bias is None else torch.zeros_like(bias), dstate
    config = config or backward_config(B, L, E, roomy=k <= 4 and x.element_size() <= 2 and positions is None)
    grid = _grid(B, L, E, config)
    partial = torch.empty(B * grid[1], k + 1, E, dtype=torch.float32, device=x.device)
    backward_kernel[grid](
        dy,
        _or(dfinal, x),
        x,
        weight.contiguous(),
        _or(bias, weight),
        _or(state, x),
        _or(positions, x),
        _or(lengths, x),
        dx,
        dstate,
        partial,
        L,
        E,
        config.rows,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        _position_stride(positions, L),
        K=k,
        HAS_BIAS=bias is not None,
        HAS_STATE=state is not None,
        HAS_POSITIONS=positions is not None,
        HAS_LENGTHS=lengths is not None,
        HAS_DFINAL=dfinal is not None and k > 1,
        HAS_DSTATE=with_dstate and k > 1,
        BLOCK=_block(E),
        UNROLL=config.unroll,
        enable_fp_fusion=True,
        num_warps=1,
        maxnreg=config.registers,
        num_stages=1,
    )
    # Always in the same order, unlike atomic additions.
    sums = partial.sum(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(sums[:k].t())
    dbias = weight.new_empty(0) if bias is None else sums[k].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dstate


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, dfinal: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, state, positions, lengths = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(x.shape)
    with_dstate = state is not None and ctx.needs_input_grad[3]
    dx, dweight, dbias, dstate = _conv_backward(dy, dfinal, x, weight, bias, state, positions, lengths, with_dstate)
    return dx, dweight, None if bias is None else dbias, dstate if with_dstate else None, None, None


_conv.register_autograd(_backward, setup_context=_setup_context)


def _grid(B: int, L: int, E: int, config: Config) -> tuple[int, int, int]:
    # Channels first: programs that run together read whole rows.
    return triton.cdiv(E, _block(E)), triton.cdiv(L, config.rows), B


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """``tensor``, dense; where there is none, any pointer: the kernel does not follow it."""
    return other if tensor is None else tensor.contiguous()


def _position_stride(positions: torch.Tensor | None, L: int) -> int:
    """Elements from one row of (dense) positions to the next: 0 where one row serves the whole batch."""
    return L if positions is not None and positions.shape[0] > 1 else 0
