"""SwiGLU MLP: the layer that looks at one token at a time."""

from __future__ import annotations

import torch

from samba_lm.config import ModelConfig, SwiGLU
from samba_lm.mixers.base import Mixer, Tensors
from samba_lm.mixers.registry import register_mixer
from samba_lm.nn.init import Init
from samba_lm.nn.linear import Linear
from samba_lm.span import Span


@register_mixer(SwiGLU)
class SwiGLUMLP(Mixer):
    """W3(SiLU(W1 x) * W2 x); no state. w1, w2 are one product."""

    reads_parts = True
    recurrent = False

    def __init__(self, spec: SwiGLU, config: ModelConfig) -> None:
        super().__init__()
        self.w12 = Linear(config.d_model, 2 * spec.width)  # rows [W1 (gate); W2 (up)]
        self.w3 = Linear(spec.width, config.d_model)

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        return self.w3.of_swiglu(self.w12(x)), {}

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        return {}

    def reset_parameters(self, init: Init) -> None:
        init.linear(self.w12.weight)
        init.output(self.w3.weight)
