"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from samba_lm.ops.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Normalise the last dim; weight [D]. Accepts the fp32 residual stream and returns its dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(
        self, x: torch.Tensor, branch: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + branch (None: x itself) in x's dtype, and that sum normalised in ``dtype``; one kernel on the GPU."""
        return add_rms_norm(x, branch, self.weight, self.eps, dtype)
