"""The selective scan as its definition: a loop over time, in fp32 at least."""

from __future__ import annotations

import torch


def scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    resets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t;  y_t = C_t . h_t  (SPEC equation of the S6 layer).

    u, delta [B, L, E] (delta after softplus), A [E, N], B, C [B, L, N], state [B, E, N], all in one dtype;
    resets bool [B, L] or None: the state is dropped before that token is read. Returns y [B, L, E], state [B, E, N].
    """
    h, ys = state, []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        if resets is not None:
            decay = decay.masked_fill(resets[:, t, None, None], 0.0)
        h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(ys, dim=1), h
