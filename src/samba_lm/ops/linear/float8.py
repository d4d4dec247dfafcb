"""Linear maps whose products are of float8 numbers: bf16 in, bf16 out, weights and their gradients in fp32.

    forward    y = x W^T          x in e4m3, every row to its own largest value; W in e4m3 to its largest value
    backward   dx = dy W          dy in e5m2, one scale; the same bits of W
               dW = dy^T x        the same bits of x, whose rows' scales are multiplied into dy; dy in e5m2, one scale

So x and W are rounded once, and of x only the transposed e4m3 is kept: half the memory of bf16. Gradients have five
bits of exponent, which spares looking through all of them for their scale: a part is (one piece of 128 columns in
``EVERY``, other columns in each 32 rows), and its largest value is put ``HEADROOM`` below the largest number, so that
nothing is cut off unless it is that much larger than all that was seen; what is, saturates. Sums are fp32, those over
the tokens without the tensor cores' short accumulators.

No state: scales come from the tensors at hand, so a run that is continued gives the same bits. A weight's cast is an
operation of its own (:func:`float8_weight`), for callers to keep while the weight stays.

What it costs and saves, a token, at 2.8 TB/s and 700 (bf16) or 1200 (float8) TFLOP/s: the three products of an
[n_in, n_out] map save 3.6e-15 s x n_in n_out, the casts cost (4 n_in + 4.25 n_out) bytes, 1.5e-12 s x (n_in + n_out).
Even at n_in n_out / (n_in + n_out) = 420, a square of 840; :func:`pays` asks for ``LEAST``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from samba_lm.errors import UserError
from samba_lm.ops.backend import HAS_TRITON, Backend, choose

BACKENDS = ("reference", "triton")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {E4M3: 448.0, E5M2: 57344.0}
HEADROOM = 128.0
EVERY = 8
ROWS, PIECE = 32, 128
"""The tile in which gradients are looked through, as in the kernels."""
TINY = 1e-30
MULTIPLE = 16
"""Float8 products want the length of what they sum over, and their second operand's, to be a multiple of this."""
LEAST = 640.0
FAST_FORWARD, FAST_DX, FAST_DW = True, True, False
"""Whether products keep partial sums in the tensor cores' short accumulators: faster, about 13 bits."""


def why_not(device: torch.device) -> str | None:
    """Why float8 products cannot run on ``device``, in a few words; None where they can."""
    if device.type != "cuda":
        return f"runs on a CUDA GPU, and this is {device}"
    if torch.version.hip is not None:
        return "is written for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"needs a GPU of compute capability 8.9 or higher, and {device} has {capability[0]}.{capability[1]}"
    return None if HAS_TRITON else "needs Triton, which comes with PyTorch's CUDA builds for Linux"


def require_float8(device: torch.device) -> None:
    """Raise UserError unless ``device`` multiplies float8 numbers."""
    if problem := why_not(device):
        raise UserError(f"train.float8 {problem}: leave it out, or set it to false.")


def pays(n_in: int, n_out: int, least: float = LEAST) -> bool:
    """Whether float8 is faster for a map from n_in to n_out and can be used for it."""
    fits = n_in % MULTIPLE == 0 and n_out % MULTIPLE == 0
    return fits and n_in * n_out >= least * (n_in + n_out)


class Float8Weight(NamedTuple):
    """A weight [n_out, n_in] in e4m3: as it is, transposed, and its scale n_out times, fp32."""

    q: torch.Tensor
    qt: torch.Tensor
    scale: torch.Tensor


def float8_weight(weight: torch.Tensor, *, backend: Backend = "auto") -> Float8Weight:
    """weight [n_out, n_in], both multiples of 16, in e4m3. Raises UserError for other sizes."""
    if any(n % MULTIPLE for n in weight.shape):
        raise UserError(f"float8: a weight's sizes must be multiples of {MULTIPLE}, and these are {list(weight.shape)}")
    kernels = choose(backend, BACKENDS, "float8_linear", weight) == "triton"
    return Float8Weight(*_cast_weight(weight.detach(), kernels))


def float8_linear(
    x: torch.Tensor, weight: torch.Tensor, cast: Float8Weight | None = None, *, backend: Backend = "auto"
) -> torch.Tensor:
    """x W^T by float8 products.

    Args:
        x: [..., n_in], bf16 (or another floating dtype). weight: [n_out, n_in], fp32 or x's dtype. Both sizes are
            multiples of 16.
        cast: what ``float8_weight`` gives of the weight, where that is known already.
        backend: ``triton``: kernels for the casts; ``reference``: the same casts in PyTorch. The products are the
            GPU's float8 ones, on a CPU those of the rounded numbers in fp32.

    Returns:
        [..., n_out] in x's dtype. The gradients have their arguments' dtypes. An infinite or NaN number in x or in the
        gradient makes results that are not finite.
    """
    y = _call(x, weight, cast, False, backend)[0]
    return y.unflatten(0, x.shape[:-1])


def float8_linear_halves(
    x: torch.Tensor, weight: torch.Tensor, cast: Float8Weight | None = None, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of x W^T, each [..., n_out / 2]: two products, whose gradients are cast into one tensor."""
    first, second = _call(x, weight, cast, True, backend)
    return first.unflatten(0, x.shape[:-1]), second.unflatten(0, x.shape[:-1])


def _call(
    x: torch.Tensor, weight: torch.Tensor, cast: Float8Weight | None, halves: bool, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = choose(backend, BACKENDS, "float8_linear", x) == "triton"
    if halves and weight.shape[0] % (2 * MULTIPLE):
        raise UserError(f"float8: each half of {list(weight.shape)} needs a multiple of {MULTIPLE} rows")
    cast = cast or float8_weight(weight, backend=backend)
    first, second, *_ = _linear(x.flatten(0, -2), weight, *cast, halves, kernels)
    return first, second


def padded(rows: int) -> int:
    """``rows`` rounded up to what a product can sum over."""
    return -(-rows // MULTIPLE) * MULTIPLE


def product(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    """(a_scale a) (b_scale b)^T in ``dtype``: a [M, K], b [N, K] float8, contiguous; scales [1], or [M] and [N]."""
    if a_scale.numel() > 1 or b_scale.numel() > 1:
        a_scale, b_scale = a_scale[:, None], b_scale[None, :]
    if a.is_cuda and a.shape[0] > 0:
        a_scale, b_scale = (_aligned(scale) for scale in (a_scale, b_scale))
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() @ b.float().t()) * a_scale * b_scale).to(dtype)


def _aligned(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` where cuBLASLt may want it: at a multiple of 16 bytes, which the second of two is not."""
    return scale.clone() if scale.data_ptr() % 16 else scale


# Casts. Each is there twice: in the kernels, and below as their definition.


def cast_rows(x: torch.Tensor, kernels: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] in e4m3, the transpose [K, padded(M)], and the scales of its rows, fp32 [M]."""
    if kernels and x.shape[0]:
        from samba_lm.ops.linear import triton_float8

        return triton_float8.cast_rows(x, padded(x.shape[0]), TOP[E4M3])
    wide = x.float()
    largest = wide.abs().amax(1).clamp(min=TINY)
    q = to_float8(wide * (TOP[E4M3] / largest)[:, None], E4M3)
    return q, transposed(q), largest / TOP[E4M3]


@torch.library.custom_op("samba_lm::float8_weight", mutates_args=())
def _cast_weight(weight: torch.Tensor, kernels: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top = TOP[E4M3]
    if kernels:
        from samba_lm.ops.linear import triton_float8

        return triton_float8.cast([weight], None, weight.shape[0], E4M3, top, top, 1)
    wide = weight.float()
    largest = wide.abs().amax().clamp(min=TINY)
    q = to_float8(wide * (top / largest), E4M3)
    return q, q.t().contiguous(), (largest / top).expand(weight.shape[0]).contiguous()


@_cast_weight.register_fake
def _(weight: torch.Tensor, kernels: bool) -> Any:
    n_out, n_in = weight.shape
    q, qt = weight.new_empty(n_out, n_in, dtype=E4M3), weight.new_empty(n_in, n_out, dtype=E4M3)
    return q, qt, weight.new_empty(n_out, dtype=torch.float32)


def cast_gradient(
    parts: Sequence[torch.Tensor], weight: torch.Tensor, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts [M, N_i] side by side in e5m2; the transpose [N, padded(M)] of their rows times ``weight`` [M]; the
    scale of each, fp32 [2]."""
    goal, top = TOP[E5M2] / HEADROOM, TOP[E5M2]
    if kernels and parts[0].shape[0]:
        from samba_lm.ops.linear import triton_float8

        return triton_float8.cast(list(parts), weight, padded(parts[0].shape[0]), E5M2, goal, top, EVERY)
    wide = [part.float() for part in parts]
    looked_at = torch.cat([part * sampled(part) for part in wide], dim=1)
    whole = torch.cat(wide, dim=1)
    return cast_sampled(whole, looked_at, weight)


def cast_sampled(
    x: torch.Tensor, looked_at: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`cast_gradient`, of x fp32 [M, N] and of what its scale is to be taken from."""
    if not x.shape[0]:
        return x.to(E5M2), transposed(x.to(E5M2)), torch.ones(2, device=x.device)
    goal = TOP[E5M2] / HEADROOM
    largest = torch.stack((looked_at.abs().amax(), (looked_at * weight[:, None]).abs().amax())).clamp(min=TINY)
    inverse = goal / largest
    q = to_float8(x * inverse[0], E5M2)
    return q, transposed(to_float8(x * (weight * inverse[1])[:, None], E5M2)), largest / goal


def sampled(x: torch.Tensor) -> torch.Tensor:
    """Which numbers of x [M, N] are looked at for its scale."""
    every = min(EVERY, -(-x.shape[1] // PIECE))
    row = torch.arange(x.shape[0], device=x.device)[:, None] // ROWS
    piece = torch.arange(x.shape[1], device=x.device) // PIECE
    return row % every == piece % every


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to nearest; what is beyond the largest number becomes that, what is infinite NaN."""
    return (x + x * 0).clamp(-TOP[dtype], TOP[dtype]).to(dtype)


def transposed(q: torch.Tensor) -> torch.Tensor:
    """q [M, N] -> [N, padded(M)], zeros at the end."""
    out = torch.zeros(q.shape[1], padded(q.shape[0]), dtype=torch.uint8, device=q.device)
    out[:, : q.shape[0]] = q.view(torch.uint8).t()
    return out.view(q.dtype)


# The map itself.


@torch.library.custom_op("samba_lm::float8_linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    w: torch.Tensor,
    wt: torch.Tensor,
    w_scale: torch.Tensor,
    halves: bool,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (its first half and its second, which is empty without ``halves``), and for backward the transpose of x in
    e4m3 and the scales of its rows. ``weight`` itself is there to get the gradient."""
    q, qt, scale = cast_rows(x, kernels)
    split = w.shape[0] // (2 if halves else 1)
    first = product(q, w[:split], scale, w_scale[:split], x.dtype, FAST_FORWARD)
    if not halves:
        return first, x.new_empty(x.shape[0], 0), qt, scale
    return first, product(q, w[split:], scale, w_scale[split:], x.dtype, FAST_FORWARD), qt, scale


@_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    w: torch.Tensor,
    wt: torch.Tensor,
    w_scale: torch.Tensor,
    halves: bool,
    kernels: bool,
) -> Any:
    (rows, n_in), n_out = x.shape, w.shape[0]
    split = n_out // (2 if halves else 1)
    y = x.new_empty(rows, split), x.new_empty(rows, n_out - split)
    return *y, x.new_empty(n_in, padded(rows), dtype=E4M3), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("samba_lm::float8_linear_backward", mutates_args=())
def _linear_backward(
    dfirst: torch.Tensor,
    dsecond: torch.Tensor,
    qt: torch.Tensor,
    scale: torch.Tensor,
    wt: torch.Tensor,
    w_scale: torch.Tensor,
    wide: bool,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [M, n_in] and dW [n_out, n_in]; ``wide``: dW in fp32, whatever the gradients' dtype."""
    parts = [part for part in (dfirst, dsecond) if part.shape[1]]
    return linear_gradients(*cast_gradient(parts, scale, kernels), qt, wt, w_scale, dfirst.dtype, wide)


def linear_gradients(
    dy: torch.Tensor,
    dyt: torch.Tensor,
    dy_scale: torch.Tensor,
    qt: torch.Tensor,
    wt: torch.Tensor,
    w_scale: torch.Tensor,
    dtype: torch.dtype,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dW of what :func:`cast_gradient` gave and the forward pass kept."""
    one = torch.ones(1, device=dy.device)
    dx = product(dy, wt, dy_scale[:1], w_scale[:1], dtype, FAST_DX)
    return dx, product(dyt, qt, dy_scale[1:], one, torch.float32 if wide else dtype, FAST_DW)


@_linear_backward.register_fake
def _(
    dfirst: torch.Tensor,
    dsecond: torch.Tensor,
    qt: torch.Tensor,
    scale: torch.Tensor,
    wt: torch.Tensor,
    w_scale: torch.Tensor,
    wide: bool,
    kernels: bool,
) -> Any:
    dweight = dfirst.new_empty(wt.shape[1], wt.shape[0], dtype=torch.float32 if wide else dfirst.dtype)
    return dfirst.new_empty(dfirst.shape[0], wt.shape[0]), dweight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, wt, w_scale, ctx.halves, ctx.kernels = inputs
    ctx.dtype, ctx.wide = x.dtype, weight.dtype == torch.float32
    ctx.save_for_backward(*output[2:], wt, w_scale)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dfirst: torch.Tensor | None, dsecond: torch.Tensor | None, *_: Any) -> Any:
    nothing = None, None, None, None, None
    if dfirst is None and dsecond is None:
        return None, None, *nothing
    kept = ctx.saved_tensors  # read once: what activation checkpointing makes again is there only once
    _, scale, _, w_scale = kept
    split = w_scale.shape[0] // (2 if ctx.halves else 1)
    if dfirst is None:
        dfirst = scale.new_zeros(scale.shape[0], split, dtype=ctx.dtype)
    if dsecond is None:
        dsecond = scale.new_zeros(scale.shape[0], w_scale.shape[0] - split, dtype=ctx.dtype)
    dx, dweight = _linear_backward(dfirst, dsecond, *kept, ctx.wide, ctx.kernels)
    return dx, dweight, *nothing


_linear.register_autograd(_gradients, setup_context=_setup)
