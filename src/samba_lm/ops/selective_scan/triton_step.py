"""One token of the selective scan on Triton, for decoding: softplus, state, C.h, skip and gate in one kernel.

The state is read and written once; nothing is asked of the host, so that a CUDA graph can hold it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from samba_lm.ops.shapes import last_dense
from samba_lm.ops.triton_math import LN_2, exp2, silu, softplus2

TILE = 1024  # states a program
WARPS = 2


@triton.jit
def _step_kernel(
    u,  # [B, E], rows u_batch apart; delta, z, B, C likewise
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    state,
    y,
    new_state,
    E,
    u_batch,
    delta_batch,
    B_batch,
    C_batch,
    z_batch,
    N: tl.constexpr,
    N_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    states = tl.arange(0, N_BLOCK)
    inside = channels < E
    present = states < N
    both = inside[:, None] & present[None, :]
    tile = channels[:, None] * N + states[None, :]
    state += b * E * N
    new_state += b * E * N
    h = tl.load(state + tile, mask=both, other=0.0)
    decay = tl.load(A + tile, mask=both, other=0.0).to(tl.float32)
    enter = tl.load(B + b * B_batch + states, mask=present, other=0.0).to(tl.float32)
    leave = tl.load(C + b * C_batch + states, mask=present, other=0.0).to(tl.float32)
    x = tl.load(u + b * u_batch + channels, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(delta + b * delta_batch + channels, mask=inside, other=0.0).to(tl.float32)
    step, _ = softplus2(step + tl.load(delta_bias + channels, mask=inside, other=0.0).to(tl.float32))
    h = h * exp2(step[:, None] * decay) + (step * (x * LN_2))[:, None] * enter[None, :]
    tl.store(new_state + tile, h, mask=both)
    out = tl.sum(h * leave[None, :], axis=1) + x * tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_Z:
        out *= silu(tl.load(z + b * z_batch + channels, mask=inside, other=0.0).to(tl.float32))
    tl.store(y + b * E + channels, out.to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("samba_lm::selective_scan_step", mutates_args=())
def step_triton(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``selective_scan_step``; the state in fp32; no gradients.

    u, delta, z, B and C may be slices of wider rows, which are read where they are.
    """
    new_state = state.new_empty(state.shape)
    return launch(u, delta, A, B, C, D, z, delta_bias, state, new_state), new_state


def launch(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor,
    state: torch.Tensor,
    new_state: torch.Tensor,
) -> torch.Tensor:
    """y; writes ``new_state``, contiguous, which may be ``state``: a program reads its part before it writes it."""
    (batch, E), N = u.shape, A.shape[1]
    u, delta, B, C = (last_dense(t) for t in (u, delta, B, C))
    z = None if z is None else last_dense(z)
    y = u.new_empty(batch, E)
    n_block = triton.next_power_of_2(N)
    block = max(1, min(TILE // n_block, triton.next_power_of_2(E)))
    with torch.cuda.device_of(u):
        _step_kernel[triton.cdiv(E, block), batch](
            u,
            delta,
            A.contiguous(),
            B,
            C,
            D.contiguous(),
            u if z is None else z,
            delta_bias.contiguous(),
            state.contiguous(),
            y,
            new_state,
            E,
            u.stride(0),
            delta.stride(0),
            B.stride(0),
            C.stride(0),
            0 if z is None else z.stride(0),
            N=N,
            N_BLOCK=n_block,
            BLOCK=block,
            HAS_Z=z is not None,
            enable_fp_fusion=True,
            num_warps=WARPS,
            num_stages=1,
        )
    return y


@step_triton.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, state):
    return u.new_empty(u.shape), state.new_empty(state.shape)
