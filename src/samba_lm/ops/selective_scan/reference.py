"""The selective scan as its definition: a loop over time, in fp32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor,
    resets: torch.Tensor | None,
    padding: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t, y_t = (C_t h_t + D u_t) SiLU(z_t), Delta = softplus(delta + b).

    Shapes as in ``selective_scan``; A, D, delta_bias and state are in the dtype to compute in. ``padding`` bool [B, L]:
    tokens whose step is 0. Returns y [B, L, E] and the final state [B, E, N] in that dtype.
    """
    dtype = state.dtype
    u, delta, B, C = (t.to(dtype) for t in (u, delta, B, C))
    step = F.softplus(delta if delta_bias is None else delta + delta_bias)
    if padding is not None:
        step = step.masked_fill(padding[..., None], 0.0)  # decay 1, input 0: the state stays
    h, ys = state, []
    for t in range(u.shape[1]):
        decay = torch.exp(step[:, t, :, None] * A)
        if resets is not None:
            decay = decay.masked_fill(resets[:, t, None, None], 0.0)
        h = decay * h + (step[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y, h
