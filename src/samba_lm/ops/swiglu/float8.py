"""The whole SwiGLU MLP by float8 products (``samba_lm.ops.linear.float8``), as one operation: what lies between the two
maps is then cast in the pass over memory that computes it, and neither the activations nor the gradient of gate and up
are ever written in bf16. Kept for backward are x in e4m3, gate and up in bf16, and scales."""

from __future__ import annotations

from typing import Any

import torch

from samba_lm.ops.backend import Backend, choose
from samba_lm.ops.linear.float8 import (
    BACKENDS,
    E4M3,
    E5M2,
    EVERY,
    FAST_DW,
    FAST_DX,
    FAST_FORWARD,
    HEADROOM,
    TOP,
    Float8Weight,
    cast_gradient,
    cast_rows,
    cast_sampled,
    float8_weight,
    linear_gradients,
    padded,
    product,
    sampled,
    to_float8,
    transposed,
)
from samba_lm.ops.swiglu.reference import swiglu_reference


def float8_swiglu_mlp(
    x: torch.Tensor,
    w12: torch.Tensor,
    w3: torch.Tensor,
    casts: tuple[Float8Weight, Float8Weight] | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """(SiLU(x W1^T) * x W2^T) W3^T by float8 products.

    Args:
        x: [..., D]. w12: [2 F, D], rows [W1; W2]. w3: [D', F]. Sizes are multiples of 16; dtypes as in
            ``float8_linear``.
        casts: what ``float8_weight`` gives of the two weights, where that is known already.

    Returns:
        [..., D'] in x's dtype. Differentiable in x and the weights.
    """
    kernels = choose(backend, BACKENDS, "float8_swiglu_mlp", x) == "triton"
    first, second = casts or (float8_weight(w12, backend=backend), float8_weight(w3, backend=backend))
    y, *_ = _mlp(x.flatten(0, -2), w12, w3, *first, *second, kernels)
    return y.unflatten(0, x.shape[:-1])


def cast_activations(both: torch.Tensor, kernels: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU(gate) up of [M, 2 F] in e4m3 [M, F], and the scales of its rows, fp32 [M]."""
    if kernels and both.shape[0]:
        from samba_lm.ops.swiglu import triton_float8

        return triton_float8.activations(both, TOP[E4M3])
    q, _, scale = cast_rows(swiglu_reference(*both.float().chunk(2, dim=1)), kernels=False)
    return q, scale


def cast_gradients(
    both: torch.Tensor, dact: torch.Tensor, weight: torch.Tensor, act_scale: torch.Tensor, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of [gate, up] as ``cast_gradient`` gives it, and the activations [F, padded(M)] in e4m3 again."""
    if kernels and both.shape[0]:
        from samba_lm.ops.swiglu import triton_float8

        goal, tops = TOP[E5M2] / HEADROOM, (TOP[E5M2], TOP[E4M3])
        return triton_float8.gradients(both, dact, weight, act_scale, padded(both.shape[0]), goal, tops, EVERY)
    gate, up = both.float().chunk(2, dim=1)
    open_ = gate.sigmoid()
    dact = dact.float()
    dgate, dup = dact * up * (open_ + gate * open_ * (1 - open_)), dact * gate * open_
    seen = sampled(gate)
    dboth, looked_at = torch.cat((dgate, dup), dim=1), torch.cat((dgate * seen, dup * seen), dim=1)
    act = to_float8(gate * open_ * up / act_scale[:, None], E4M3)
    return *cast_sampled(dboth, looked_at, weight), transposed(act)


@torch.library.custom_op("samba_lm::float8_swiglu_mlp", mutates_args=())
def _mlp(
    x: torch.Tensor,
    w12: torch.Tensor,
    w3: torch.Tensor,
    q12: torch.Tensor,
    q12t: torch.Tensor,
    scale12: torch.Tensor,
    q3: torch.Tensor,
    q3t: torch.Tensor,
    scale3: torch.Tensor,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and for backward: the transpose of x in e4m3, its rows' scales, [gate, up], the activations' rows' scales."""
    q, qt, scale = cast_rows(x, kernels)
    both = product(q, q12, scale, scale12, x.dtype, FAST_FORWARD)
    act, act_scale = cast_activations(both, kernels)
    return product(act, q3, act_scale, scale3, x.dtype, FAST_FORWARD), qt, scale, both, act_scale


@_mlp.register_fake
def _(
    x: torch.Tensor,
    w12: torch.Tensor,
    w3: torch.Tensor,
    q12: torch.Tensor,
    q12t: torch.Tensor,
    scale12: torch.Tensor,
    q3: torch.Tensor,
    q3t: torch.Tensor,
    scale3: torch.Tensor,
    kernels: bool,
) -> Any:
    rows, n_in = x.shape
    scale = x.new_empty(rows, dtype=torch.float32)
    qt, both = x.new_empty(n_in, padded(rows), dtype=E4M3), x.new_empty(rows, q12.shape[0])
    return x.new_empty(rows, q3.shape[0]), qt, scale, both, torch.empty_like(scale)


@torch.library.custom_op("samba_lm::float8_swiglu_mlp_backward", mutates_args=())
def _mlp_backward(
    dy: torch.Tensor,
    qt: torch.Tensor,
    scale: torch.Tensor,
    both: torch.Tensor,
    act_scale: torch.Tensor,
    q12t: torch.Tensor,
    scale12: torch.Tensor,
    q3t: torch.Tensor,
    scale3: torch.Tensor,
    wide12: bool,
    wide3: bool,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx and the gradients of w12 and w3; ``wide``: in fp32."""
    dq, dqt, d_scale = cast_gradient([dy], act_scale, kernels)
    dact = product(dq, q3t, d_scale[:1], scale3[:1], dy.dtype, FAST_DX)
    dboth, dbotht, dboth_scale, actt = cast_gradients(both, dact, scale, act_scale, kernels)
    del dact
    one = torch.ones(1, device=dy.device)
    dw3 = product(dqt, actt, d_scale[1:], one, torch.float32 if wide3 else dy.dtype, FAST_DW)
    del dq, dqt, actt
    dx, dw12 = linear_gradients(dboth, dbotht, dboth_scale, qt, q12t, scale12, dy.dtype, wide12)
    return dx, dw12, dw3


@_mlp_backward.register_fake
def _(
    dy: torch.Tensor,
    qt: torch.Tensor,
    scale: torch.Tensor,
    both: torch.Tensor,
    act_scale: torch.Tensor,
    q12t: torch.Tensor,
    scale12: torch.Tensor,
    q3t: torch.Tensor,
    scale3: torch.Tensor,
    wide12: bool,
    wide3: bool,
    kernels: bool,
) -> Any:
    (n_in, n_both), (width, n_out) = q12t.shape, q3t.shape
    dw12 = dy.new_empty(n_both, n_in, dtype=torch.float32 if wide12 else dy.dtype)
    dw3 = dy.new_empty(n_out, width, dtype=torch.float32 if wide3 else dy.dtype)
    return dy.new_empty(dy.shape[0], n_in), dw12, dw3


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, w12, w3, _, q12t, scale12, _, q3t, scale3, ctx.kernels = inputs
    ctx.wide = w12.dtype == torch.float32, w3.dtype == torch.float32
    ctx.save_for_backward(*output[1:], q12t, scale12, q3t, scale3)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: torch.Tensor | None, *_: Any) -> Any:
    if dy is None:
        return (None,) * 10
    return *_mlp_backward(dy, *ctx.saved_tensors, *ctx.wide, ctx.kernels), *(None,) * 7


_mlp.register_autograd(_gradients, setup_context=_setup)
