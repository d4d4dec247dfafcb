"""RMSNorm on the GPU: a whole row lies in registers, so every tensor is read and written once."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from samba_lm.ops.backend import differentiable

TILE = 2048
"""Elements that one program reads at once at least: several rows when they are short."""


@triton.jit
def _forward(
    x_ptr, branch_ptr, weight_ptr, total_ptr, normed_ptr, kept_ptr, rstd_ptr, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
    ADD: tl.constexpr, RSTD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # One layout for all tensors, though a thread's 16 bytes are 4 numbers here and 8 there.
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, x, mask=inside)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    x *= rstd[:, None]
    tl.store(normed_ptr + at, (x * weight[None, :]).to(normed_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(kept_ptr + at, x.to(kept_ptr.dtype.element_ty), mask=inside)
    if RSTD:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward(
    dnormed_ptr, dtotal_ptr, kept_ptr, rstd_ptr, weight_ptr, dx_ptr, dbranch_ptr, partial_ptr, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
    SCALED: tl.constexpr, DTOTAL: tl.constexpr, DBRANCH: tl.constexpr,
):  # fmt: skip
    """Rows go round the programs; each program sums its own rows' share of dweight, in order."""
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=1):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        dnormed = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normal = tl.load(kept_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        if DTOTAL:
            dtotal = tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if not SCALED:
            normal *= rstd
        dweight += dnormed * normal
        dnormed *= weight[None, :]
        shared = tl.sum(dnormed * normal, axis=1) / D
        dx = rstd * (dnormed - normal * shared[:, None])
        if DTOTAL:
            dx += dtotal
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if DBRANCH:
            tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + column, tl.sum(dweight, axis=0), mask=column < D)


def tile(width: int, *tensors: torch.Tensor | None) -> tuple[dict[str, int], int]:
    """The kernels' shape constants for rows of ``width``, and the elements that a program holds at once."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    widest = max(t.element_size() for t in tensors if t is not None)
    return {"D": width, "BLOCK": block, "ROWS": rows, "VECTOR": 16 // widest}, block * rows


def programs(rows: int, rows_per_program: int, warps: int, device: torch.device) -> int:
    """How many programs share the rows in backward: 16 warps on each multiprocessor, as many as the registers hold.

    More would leave more dweights to sum, and each program fewer rows.
    """
    if device.type != "cuda":
        return min(3, triton.cdiv(rows, rows_per_program))
    resident = 16 // warps * torch.cuda.get_device_properties(device).multi_processor_count
    return min(resident, triton.cdiv(rows, rows_per_program))


def keeps_copy(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether backward reads a copy of total / rms in ``dtype``: where that is smaller than total."""
    return dtype.itemsize < x.element_size()


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) in ``dtype``."""
    return _rms_norm(x, weight, eps, dtype, differentiable(x, weight))[0]


def add_rms_norm_triton(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``add_rms_norm``, with a branch."""
    total, normed, _, _ = _add_rms_norm(x, branch, weight, eps, dtype, differentiable(x, branch, weight))
    return total, normed


def _launch_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    outputs: tuple[torch.Tensor, ...],
    differentiated: bool,
) -> None:
    width, (total, normed, kept, rstd) = x.shape[-1], outputs
    rows = x.numel() // width
    x, weight = x.contiguous(), weight.contiguous()
    branch = None if branch is None else branch.contiguous()
    constants, elements = tile(width, x, branch, normed)
    if rows:
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(rows, constants["ROWS"]),)](
                x, branch, weight, total, normed, kept, rstd, rows, eps, **constants,
                ADD=branch is not None, RSTD=differentiated, KEEP=kept.numel() > 0,
                enable_fp_fusion=True, num_warps=elements // 512,
            )  # fmt: skip


def _outputs(x: torch.Tensor, dtype: torch.dtype, differentiated: bool) -> tuple[torch.Tensor, ...]:
    """normed, and what backward reads: the copy of total / rms and 1 / rms [...] fp32; empty where not needed."""
    normed = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    kept = torch.empty_like(normed) if differentiated and keeps_copy(x, dtype) else normed.new_empty(0)
    rstd = x.new_empty(x.shape[:-1] if differentiated else 0, dtype=torch.float32)
    return normed, kept, rstd


@torch.library.custom_op("samba_lm::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, differentiated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed, kept, rstd = _outputs(x, dtype, differentiated)
    _launch_forward(x, None, weight, eps, (normed, normed, kept, rstd), differentiated)
    return normed, kept, rstd


@_rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, differentiated: bool) -> Any:
    return _outputs(x, dtype, differentiated)


@torch.library.custom_op("samba_lm::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, differentiated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed, kept, rstd = _outputs(x, dtype, differentiated)
    _launch_forward(x, branch, weight, eps, (total, normed, kept, rstd), differentiated)
    return total, normed, kept, rstd


@_add_rms_norm.register_fake
def _(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, differentiated: bool
) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_outputs(x, dtype, differentiated)


@torch.library.custom_op("samba_lm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dnormed: torch.Tensor,
    dtotal: torch.Tensor | None,
    kept: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    scaled: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the branch (empty where x's serves for both) and of the weight.

    kept: total / rms where ``scaled``, else total.
    """
    width = kept.shape[-1]
    rows = kept.numel() // width
    dnormed, kept, weight = dnormed.contiguous(), kept.contiguous(), weight.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    dx, dbranch, _ = _gradients(kept, weight, x_dtype, branch_dtype)
    constants, elements = tile(width, dnormed, dtotal, kept, dx)
    warps = 4 if elements <= 4096 else 16
    count = programs(rows, constants["ROWS"], warps, kept.device)
    partial = kept.new_empty(count, width, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(kept):
            _backward[(count,)](
                dnormed, dtotal, kept, rstd, weight, dx, dbranch, partial, rows, **constants,
                SCALED=scaled, DTOTAL=dtotal is not None, DBRANCH=branch_dtype != x_dtype,
                enable_fp_fusion=True, num_warps=warps,
            )  # fmt: skip
    return dx, dbranch, partial.sum(0).to(weight.dtype)


def _gradients(
    kept: torch.Tensor, weight: torch.Tensor, x_dtype: torch.dtype, branch_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(kept, dtype=x_dtype, memory_format=torch.contiguous_format)
    dbranch = torch.empty_like(dx, dtype=branch_dtype) if branch_dtype != x_dtype else dx.new_empty(0)
    return dx, dbranch, torch.empty_like(weight)


@_rms_norm_backward.register_fake
def _(
    dnormed: torch.Tensor,
    dtotal: torch.Tensor | None,
    kept: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    scaled: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> Any:
    return _gradients(kept, weight, x_dtype, branch_dtype)


def _save(ctx: Any, x: torch.Tensor, total: torch.Tensor, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    weight, _, dtype, differentiated = inputs[-4:]
    kept, rstd = output[-2:]
    assert differentiated, "called as a plain operator, with differentiated=False, on what needs gradients"
    ctx.scaled, ctx.x_dtype = keeps_copy(x, dtype), x.dtype
    ctx.save_for_backward(kept if ctx.scaled else total, rstd, weight)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept, rstd)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs[0], inputs[0], inputs, output)


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs[0], output[0], inputs, output)
    ctx.branch_dtype = inputs[1].dtype


def _rms_norm_grad(ctx: Any, dnormed: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if dnormed is None:
        return None, None, None, None, None
    kept, rstd, weight = ctx.saved_tensors
    dx, _, dweight = _rms_norm_backward(dnormed, None, kept, rstd, weight, ctx.scaled, ctx.x_dtype, ctx.x_dtype)
    return dx, dweight, None, None, None


def _add_rms_norm_grad(
    ctx: Any, dtotal: torch.Tensor | None, dnormed: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    if dnormed is None:  # only the sum was used
        return dtotal, None if dtotal is None else dtotal.to(ctx.branch_dtype), None, None, None, None
    kept, rstd, weight = ctx.saved_tensors
    dx, dbranch, dweight = _rms_norm_backward(
        dnormed, dtotal, kept, rstd, weight, ctx.scaled, ctx.x_dtype, ctx.branch_dtype
    )
    return dx, dx if ctx.branch_dtype == ctx.x_dtype else dbranch, dweight, None, None, None


_rms_norm.register_autograd(_rms_norm_grad, setup_context=_rms_norm_setup)
_add_rms_norm.register_autograd(_add_rms_norm_grad, setup_context=_add_rms_norm_setup)
