"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.ops.backend import compute_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, computed in fp32 at least; returns x's dtype."""
    dtype = compute_dtype(x)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)
