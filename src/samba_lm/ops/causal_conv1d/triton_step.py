"""One token of the short convolution on Triton, for decoding: one kernel, nothing asked of the host (CUDA graphs)."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from samba_lm.ops.shapes import last_dense
from samba_lm.ops.triton_math import silu

BLOCK = 128  # channels a program: decoding has few, and wants them on many multiprocessors


@triton.jit
def _step_kernel(
    x,  # [B, E], rows x_batch apart
    weight,
    bias,
    state,
    y,
    new_state,
    E,
    x_batch,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < E
    state += b * (K - 1) * E
    new_state += b * (K - 1) * E
    newest = tl.load(x + b * x_batch + channels, mask=inside, other=0.0)
    total = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(K - 1):
        tap = tl.load(state + i * E + channels, mask=inside, other=0.0)
        total += tap.to(tl.float32) * tl.load(weight + channels * K + i, mask=inside, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(new_state + (i - 1) * E + channels, tap, mask=inside)
    if K > 1:
        tl.store(new_state + (K - 2) * E + channels, newest, mask=inside)
    total += newest.to(tl.float32) * tl.load(weight + channels * K + K - 1, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + b * E + channels, silu(total).to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("samba_lm::causal_conv1d_step", mutates_args=())
def step_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``causal_conv1d_step``; no gradients."""
    new_state = x.new_empty(state.shape)
    return launch(x, weight, bias, state, new_state), new_state


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor, new_state: torch.Tensor
) -> torch.Tensor:
    """y; writes ``new_state``, contiguous and in x's dtype, which may be ``state``: each channel reads a tap before it
    writes to its place."""
    (B, E), k = x.shape, weight.shape[1]
    x = last_dense(x)
    y = x.new_empty(B, E)
    with torch.cuda.device_of(x):
        _step_kernel[triton.cdiv(E, BLOCK), B](
            x,
            weight.contiguous(),
            bias.contiguous(),
            state.to(x.dtype).contiguous(),
            y,
            new_state,
            E,
            x.stride(0),
            K=k,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
            num_warps=1,
            num_stages=1,
        )
    return y


@step_triton.register_fake
def _(x, weight, bias, state):
    return x.new_empty(x.shape), x.new_empty(state.shape)
