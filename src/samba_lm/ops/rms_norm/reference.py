"""RMSNorm as its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.ops.backend import compute_dtype


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, computed in fp32 at least; returns x's dtype."""
    dtype = compute_dtype(x)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``add_rms_norm``."""
    total = x if branch is None else x + branch.to(x.dtype)
    return total, rms_norm_reference(total, weight, eps).to(dtype)
