"""Selective scan (S6): softplus, recurrence, skip and gate in one operation, with state in and state out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from samba_lm.errors import UserError
from samba_lm.ops.backend import Backend, choose, compute_dtype
from samba_lm.ops.selective_scan.cpu import scan_cpu
from samba_lm.ops.selective_scan.effect import total_step
from samba_lm.ops.selective_scan.reference import scan_reference
from samba_lm.ops.shapes import require, require_rank, require_type

BACKENDS = ("reference", "cpu", "triton", "cuda")
STEP_BACKENDS = ("cpu", "triton")
STATE_SIZES = (8, 16, 32, 64)
"""State sizes N that the kernels are made for; others run in PyTorch."""


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
    resets: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = (C_t . h_t + D u_t) * SiLU(z_t) with h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t (paper, section 2.1).

    Args:
        u: [B, L, E] input. delta: [B, L, E] step before softplus. A: [E, N] (negative). B, C: [B, L, N].
        D: [E] skip or None. z: [B, L, E] gate or None. delta_bias: [E], added to delta inside the softplus, or None.
        state: [B, E, N] to start from; None: zeros.
        resets: bool [B, L]; True drops the state before that token (a document starts there).
        lengths: int64 [B]; tokens from there on are padding and leave the state as it is.
        backend: see ``samba_lm.ops.backend``.

    Returns:
        y [B, L, E] in u's dtype, final state [B, E, N] in fp32 (fp64 if any input is fp64). Differentiable in all of
        the tensors, the state included. Computed in fp32 at least.

    Raises:
        UserError: shapes, devices or dtypes that do not fit together, or a backend that cannot run here.
    """
    require_rank("selective_scan", "u", u, "B, L, E")
    require_rank("selective_scan", "A", A, "E, N")
    (batch, length, E), N = u.shape, A.shape[1]
    require(
        "selective_scan",
        u.device,
        delta=(delta, (batch, length, E)),
        A=(A, (E, N)),
        B=(B, (batch, length, N)),
        C=(C, (batch, length, N)),
        D=(D, (E,)),
        z=(z, (batch, length, E)),
        delta_bias=(delta_bias, (E,)),
        state=(state, (batch, E, N)),
        resets=(resets, (batch, length)),
        lengths=(lengths, (batch,)),
    )
    require_type("selective_scan", "resets", resets, torch.bool)
    require_type("selective_scan", "lengths", lengths, torch.int64)
    dtype = compute_dtype(u, delta, A, state)
    padding = None
    if lengths is not None:
        padding = torch.arange(length, device=u.device) >= lengths[:, None]
        resets = None if resets is None else resets & ~padding
    if state is None:
        state = torch.zeros(batch, E, N, device=u.device)
    chosen = _choose(backend, u, N, dtype)
    A, state = A.to(dtype), state.to(dtype)
    if u.numel() == 0:  # no kernel cuts an empty row
        return torch.empty_like(u), state.clone()
    D, delta_bias = (None if t is None else t.to(dtype) for t in (D, delta_bias))
    if chosen == "cuda":
        from samba_lm.ops.selective_scan.cuda import scan_cuda

        return scan_cuda(u, delta, A, B, C, D, z, delta_bias, state, resets, lengths)
    if chosen == "triton":
        from samba_lm.ops.selective_scan.triton import scan_triton

        return scan_triton(u, delta, A, B, C, D, z, delta_bias, state, resets, lengths)
    if chosen == "reference":
        run = scan_reference
    elif torch.compiler.is_compiling():
        from samba_lm.ops.selective_scan.untraced import scan_untraced as run
    else:
        run = scan_cpu
    y, final = run(u, delta, A, B, C, D, z, delta_bias, state, resets, padding)
    return y.to(u.dtype), final


def scan_effect(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    *,
    resets: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`selective_scan` of these tokens does to a state h without resets: h -> kept * h + final.

    Both [B, E, N], differentiable, in fp32 (fp64 if any input is fp64): ``final`` the state that is made of zeros,
    ``kept`` = exp(A sum_t Delta_t) of all L tokens, padding too (what follows padding is padding).
    """
    # The outputs are not looked at, so any C serves.
    _, final = selective_scan(u, delta, A, B, B, delta_bias=delta_bias, resets=resets, lengths=lengths, backend=backend)
    total = total_step(delta, delta_bias, final.dtype)
    return final, torch.exp(total[..., None] * A.to(final.dtype))


def _choose(backend: Backend, u: torch.Tensor, N: int, dtype: torch.dtype) -> str:
    """CUDA C++ where it runs, Triton on other GPUs, PyTorch for fp64 and for state sizes that have no kernels."""
    chosen = choose(backend, BACKENDS, "selective_scan", u, u.shape[0])
    if chosen in ("cuda", "triton") and dtype == torch.float64:
        if backend != "auto":
            raise UserError(f"selective_scan: the {backend} backend computes in fp32, and an input is fp64")
        return "cpu"
    if chosen in ("cuda", "triton") and N not in STATE_SIZES:
        if backend != "auto":
            raise UserError(f"selective_scan: the {backend} backend has kernels for N of {STATE_SIZES}, and N is {N}")
        return "cpu"
    if chosen == "cuda":
        from samba_lm.ops.selective_scan.cuda import fits

        if not fits(u, N):
            if backend != "auto":
                raise UserError(f"selective_scan: the cuda backend does not take inputs {list(u.shape)} on this GPU")
            return "triton"
    return chosen


def selective_scan_step(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor,
    state: torch.Tensor,
    *,
    in_place: bool = False,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of :func:`selective_scan`, for decoding: u, delta, z [B, E], B, C [B, N]; A, D, delta_bias as state.

    Returns y [B, E] in u's dtype and the new state [B, E, N] in the state's, fp32 at least; the given one stays as it
    was, or is the new one with ``in_place`` (contiguous then, and without gradients). No gradients on the triton
    backend.
    """
    require_rank("selective_scan_step", "u", u, "B, E")
    require_rank("selective_scan_step", "A", A, "E, N")
    (batch, E), N = u.shape, A.shape[1]
    require(
        "selective_scan_step",
        u.device,
        delta=(delta, (batch, E)),
        A=(A, (E, N)),
        B=(B, (batch, N)),
        C=(C, (batch, N)),
        D=(D, (E,)),
        z=(z, (batch, E)),
        delta_bias=(delta_bias, (E,)),
        state=(state, (batch, E, N)),
    )
    dtype = state.dtype
    if choose(backend, STEP_BACKENDS, "selective_scan_step", state) == "triton":
        from samba_lm.ops.selective_scan.triton_step import launch, step_triton

        if in_place:
            return launch(u, delta, A, B, C, D, z, delta_bias, state, state), state
        return step_triton(u, delta, A, B, C, D, z, delta_bias, state)
    x = u.to(dtype)
    step = F.softplus(delta.to(dtype) + delta_bias)
    decay = ((step * math.log2(math.e))[..., None] * A).exp2_()
    out = state if in_place else None
    state = torch.baddbmm(decay.mul_(state), (step * x)[..., None], B.to(dtype)[:, None], out=out)
    y = torch.bmm(state, C.to(dtype)[..., None])[..., 0].addcmul_(x, D)
    if z is not None:
        y.mul_(F.silu(z.to(dtype)))
    return y.to(u.dtype), state
