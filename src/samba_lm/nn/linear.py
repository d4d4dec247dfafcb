"""Linear map that computes in its input's dtype, whatever its parameters': fp32 weights serve bf16 activations."""

from __future__ import annotations

import torch
from torch import nn

from samba_lm.nn.cast import cast
from samba_lm.ops.linear import linear, linear_halves
from samba_lm.ops.swiglu import swiglu_linear


class Linear(nn.Module):
    """y = x W^T + b. x [..., n_in] -> [..., n_out]; weight [n_out, n_in]; uninitialised until the model is."""

    bias: nn.Parameter | None

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, cast(self.weight, x.dtype), bias)

    def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The upper and the lower half of the outputs, each [..., n_out / 2]; no bias."""
        return linear_halves(x, cast(self.weight, x.dtype))

    def of_swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """W (SiLU(gate) * up) of gate_up [..., 2 n_in], the gate first; no bias."""
        return swiglu_linear(gate_up, cast(self.weight, gate_up.dtype))
