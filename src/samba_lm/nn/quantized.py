"""A linear map whose weight is kept in 8 or 4 bits a number. It reads as ``Linear`` does and cannot be trained."""

from __future__ import annotations

import torch
from torch import nn

from samba_lm.nn.linear import Linear
from samba_lm.ops.quantized_linear import Packed, pack_for_cpu, quantize, quantized_linear
from samba_lm.ops.quantized_linear.reference import Kind
from samba_lm.ops.swiglu import swiglu


class QuantizedLinear(nn.Module):
    """y = x W^T + b. x [..., n_in] -> [..., n_out] in x's dtype; what is stored is described by ``quantize``.

    The numbers are buffers, no parameters: optimizers do not see them, ``to(dtype)`` leaves the whole numbers alone.
    """

    quantized: torch.Tensor
    scale: torch.Tensor
    packed_weight: torch.Tensor | None
    packed_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: Linear, kind: Kind) -> None:
        """Of a linear map's weight as it is now; bf16 or fp32."""
        super().__init__()
        quantized, scale = quantize(linear.weight, kind)
        self.width = linear.weight.shape[1]
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        # Not in the state dict: the order differs between processors, and it is the same weight.
        packed = pack_for_cpu(quantized, scale)
        self.register_buffer("packed_weight", None if packed is None else packed.weight, persistent=False)
        self.register_buffer("packed_scale", None if packed is None else packed.scale, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The upper and the lower half of the outputs, each [..., n_out / 2]; no bias."""
        first, second = self._product(x).chunk(2, dim=-1)
        return first, second

    def of_swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """W (SiLU(gate) * up) of gate_up [..., 2 n_in], the gate first; no bias."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self._product(swiglu(gate, up))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        packed = None
        if self.packed_weight is not None and self.packed_scale is not None:
            packed = Packed(self.packed_weight, self.packed_scale.bfloat16())
        return quantized_linear(x, self.quantized, self.scale.float(), packed)
