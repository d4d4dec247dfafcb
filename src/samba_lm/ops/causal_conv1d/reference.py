"""The definition of the short convolution: one product a tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.ops.backend import compute_dtype


def conv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``causal_conv1d``; the state is given and in x's dtype."""
    k, length = weight.shape[1], x.shape[1]
    dtype = compute_dtype(x)
    padded = torch.cat((state, x), dim=1)  # [B, k-1+L, E]
    y = torch.zeros_like(x, dtype=dtype)
    for j in range(k):
        tap = padded[:, k - 1 - j : k - 1 - j + length].to(dtype)
        if positions is not None:
            tap = tap.masked_fill((positions < j)[..., None], 0.0)
        y = y + tap * weight[:, k - 1 - j].to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return F.silu(y).to(x.dtype), final_state(padded, k, positions, lengths)


def final_state(
    padded: torch.Tensor, k: int, positions: torch.Tensor | None, lengths: torch.Tensor | None
) -> torch.Tensor:
    """[B, k-1, E]: the last k-1 valid inputs of ``padded`` (state, then x), those of earlier documents zero."""
    if lengths is None:
        final = padded[:, padded.shape[1] - (k - 1) :].clone()  # a view would keep the whole input alive
    else:
        index = lengths[:, None] + torch.arange(k - 1, device=padded.device)
        final = padded.gather(1, index[..., None].expand(-1, -1, padded.shape[2]))
    if positions is not None:
        final = final.masked_fill(_before_document(positions, lengths, k)[..., None], 0.0)
    return final


def _before_document(positions: torch.Tensor, lengths: torch.Tensor | None, k: int) -> torch.Tensor:
    """bool [B, k-1]: inputs of the final state that came before the last document, which it must not remember."""
    distance = torch.arange(k - 1, 0, -1, device=positions.device)  # how long before the next token each was read
    if lengths is None:
        return positions[:, -1:] + 1 < distance
    last = positions.expand(lengths.shape[0], -1).gather(1, (lengths - 1).clamp(min=0)[:, None])
    # A row that read nothing keeps its state, which is clean already.
    return (last + 1 < distance) & (lengths > 0)[:, None]
