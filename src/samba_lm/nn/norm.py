"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from samba_lm.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Normalise the last dim; weight [D]. Accepts the fp32 residual stream and returns its dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
