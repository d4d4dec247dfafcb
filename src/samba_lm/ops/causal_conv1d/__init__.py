"""Depthwise causal convolution over time, with state in and out and document boundaries.

The definition is also the fast path: k shifted multiply-adds on channels-last data, which beats the general
convolution of PyTorch's CPU backend for k = 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.ops.backend import compute_dtype


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = SiLU(bias + sum_j weight[:, k-1-j] x_{t-j}), j = 0..k-1.

    Args:
        x: [B, L, E]. weight: [E, k]. bias: [E] or None.
        state: [B, k-1, E] the inputs before x, oldest first; None: zeros.
        positions: int64 [B, L] position of each token in its document; taps that would reach before position 0 count
            as zero. None: one document, taps reach into the state.
        lengths: int64 [B] number of tokens that are not padding at the right; None: all.

    Returns:
        y [B, L, E] in x's dtype, and the state after the last valid token [B, k-1, E] in x's dtype.
    """
    k, length = weight.shape[1], x.shape[1]
    dtype = compute_dtype(x)
    if state is None:
        state = x.new_zeros(x.shape[0], k - 1, x.shape[2])
    padded = torch.cat((state.to(x.dtype), x), dim=1)  # [B, k-1+L, E]
    taps = weight.to(dtype)
    # In place from the second tap on: a fresh tensor a tap would cost more than the arithmetic.
    y = padded[:, k - 1 :].to(dtype) * taps[:, k - 1]
    for j in range(1, k):
        tap = padded[:, k - 1 - j : k - 1 - j + length].to(dtype)
        if positions is not None:
            tap = tap.masked_fill((positions < j)[..., None], 0.0)
        y.addcmul_(tap, taps[:, k - 1 - j])
    if bias is not None:
        y.add_(bias.to(dtype))
    y = F.silu(y, inplace=not torch.is_grad_enabled())
    if lengths is None:
        final = padded[:, length:].clone()  # a view would keep the whole input alive
    else:
        index = lengths[:, None] + torch.arange(k - 1, device=x.device)
        final = padded.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    if positions is not None:
        final = final.masked_fill(_before_document(positions, lengths, k)[..., None], 0.0)
    return y.to(x.dtype), final


def _before_document(positions: torch.Tensor, lengths: torch.Tensor | None, k: int) -> torch.Tensor:
    """bool [B, k-1]: inputs of the final state that came before the last document, which it must not remember."""
    distance = torch.arange(k - 1, 0, -1, device=positions.device)  # how long before the next token each was read
    if lengths is None:
        return positions[:, -1:] + 1 < distance
    last = positions.gather(1, (lengths - 1).clamp(min=0)[:, None])
    # A row that read nothing keeps its state, which is clean already.
    return (last + 1 < distance) & (lengths > 0)[:, None]


def causal_conv1d_step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of :func:`causal_conv1d` with bias and SiLU, for decoding: x [B, E], state [B, k-1, E]."""
    dtype = compute_dtype(x)
    window = torch.cat((state, x[:, None]), dim=1)
    y = torch.linalg.vecdot(window.to(dtype), weight.to(dtype).t(), dim=1).add_(bias.to(dtype))
    return F.silu(y, inplace=True).to(x.dtype), window[:, 1:]
