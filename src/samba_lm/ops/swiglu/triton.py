"""SwiGLU on the GPU: one pass over memory forward, one backward that also gives the activations again."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from samba_lm.ops.shapes import last_dense
from samba_lm.ops.triton_math import sigmoid

TILE = 2048
"""Elements of each tensor a program."""
WARPS = 4


@triton.jit
def _tile(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows and columns, and which of them are inside."""
    across: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < WIDTH)


@triton.jit
def _forward(
    gate_ptr, up_ptr, act_ptr, rows, gate_stride, up_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, WIDTH, BLOCK, ROWS)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    act = gate * sigmoid(gate) * up
    tl.store(act_ptr + row * WIDTH + column, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate_ptr, up_ptr, dact_ptr, dgate_ptr, dup_ptr, act_ptr, rows, gate_stride, up_stride, gradient_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, WIDTH, BLOCK, ROWS)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    dact = tl.load(dact_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    open_ = sigmoid(gate)
    silu = gate * open_
    at = row * gradient_stride + column
    dgate = dact * up * (open_ + silu * (1.0 - open_))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, (dact * silu).to(dup_ptr.dtype.element_ty), mask=inside)
    if ACT:
        tl.store(act_ptr + row * WIDTH + column, (silu * up).to(act_ptr.dtype.element_ty), mask=inside)


def tile(rows: int, width: int) -> tuple[int, dict[str, int]]:
    """The number of programs and the kernels' shape constants."""
    block = min(TILE, triton.next_power_of_2(width))
    constants = {"WIDTH": width, "BLOCK": block, "ROWS": TILE // block}
    return triton.cdiv(rows, TILE // block) * triton.cdiv(width, block), constants


def swiglu_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up."""
    return _swiglu(gate, up)


def swiglu_linear_triton(gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Same arguments, results and meaning as ``swiglu_linear``."""
    return _swiglu_linear(gate_up, weight)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, F], a view where its rows lie evenly apart, as a half of a projection does."""
    return last_dense(x.reshape(-1, x.shape[-1]))


@torch.library.custom_op("samba_lm::swiglu", mutates_args=())
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    act = torch.empty_like(gate, memory_format=torch.contiguous_format)
    g, u = _rows(gate), _rows(up)
    count, constants = tile(*g.shape)
    if count:
        with torch.cuda.device_of(gate):
            _forward[(count,)](
                g, u, act, g.shape[0], g.stride(0), u.stride(0), **constants, enable_fp_fusion=True, num_warps=WARPS
            )
    return act


@_swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> Any:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _launch_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    dact: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    act: torch.Tensor | None,
) -> None:
    g, u, dg, du = (_rows(t) for t in (gate, up, dgate, dup))
    count, constants = tile(*g.shape)
    if count:
        with torch.cuda.device_of(gate):
            _backward[(count,)](
                g, u, dact.contiguous(), dg, du, act, g.shape[0], g.stride(0), u.stride(0), dg.stride(0), **constants,
                ACT=act is not None, enable_fp_fusion=True, num_warps=WARPS,
            )  # fmt: skip


@torch.library.custom_op("samba_lm::swiglu_backward", mutates_args=())
def _swiglu_backward(gate: torch.Tensor, up: torch.Tensor, dact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    _launch_backward(gate, up, dact, dgate, dup, None)
    return dgate, dup


@_swiglu_backward.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, dact: torch.Tensor) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))


@torch.library.custom_op("samba_lm::swiglu_backward_and_again", mutates_args=())
def _swiglu_backward_and_again(
    gate_up: torch.Tensor, dact: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of gate_up [..., 2 F], and SiLU(gate) * up [..., F] again, empty unless asked for."""
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    act = torch.empty_like(dact, memory_format=torch.contiguous_format) if again else None
    (gate, up), (dgate, dup) = gate_up.chunk(2, dim=-1), dgate_up.chunk(2, dim=-1)
    _launch_backward(gate, up, dact, dgate, dup, act)
    return dgate_up, dact.new_empty(0) if act is None else act


@_swiglu_backward_and_again.register_fake
def _(gate_up: torch.Tensor, dact: torch.Tensor, again: bool) -> Any:
    dgate_up, act = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate_up, dact))
    return dgate_up, act if again else dact.new_empty(0)


@torch.library.custom_op("samba_lm::swiglu_linear", mutates_args=())
def _swiglu_linear(gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.linear(_swiglu(gate, up), weight)


@_swiglu_linear.register_fake
def _(gate_up: torch.Tensor, weight: torch.Tensor) -> Any:
    return gate_up.new_empty(*gate_up.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, dact: torch.Tensor) -> Any:
    return _swiglu_backward(*ctx.saved_tensors, dact)


def _linear_grad(ctx: Any, dy: torch.Tensor) -> Any:
    gate_up, weight = ctx.saved_tensors
    again = ctx.needs_input_grad[1]  # not of a frozen weight, beside an adapter
    dgate_up, act = _swiglu_backward_and_again(gate_up, dy @ weight, again)
    return dgate_up, dy.reshape(-1, dy.shape[-1]).t() @ act.reshape(-1, act.shape[-1]) if again else None


_swiglu.register_autograd(_grad, setup_context=_setup)
_swiglu_linear.register_autograd(_linear_grad, setup_context=_setup)
