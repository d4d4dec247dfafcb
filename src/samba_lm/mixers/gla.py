"""Gated Linear Attention (Yang et al. 2023), as the paper's Sliding GLA uses it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from samba_lm.config import GatedLinearAttention, ModelConfig
from samba_lm.mixers.base import state_dtype
from samba_lm.mixers.linear_attention import LinearAttentionMixer
from samba_lm.mixers.registry import register_mixer
from samba_lm.nn.init import Init
from samba_lm.nn.linear import Linear


@register_mixer(GatedLinearAttention)
class GLAMixer(LinearAttentionMixer):
    """Decay of each key channel: log a_t = logsigmoid(W_2 W_1 x + b) / 16, of low rank."""

    def __init__(self, spec: GatedLinearAttention, config: ModelConfig) -> None:
        super().__init__(spec, config)
        self.normalizer = spec.gate_normalizer
        self.decay_down = Linear(config.d_model, spec.gate_rank)
        self.decay_up = Linear(spec.gate_rank, spec.key_dim(config.d_model), bias=True)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.decay_up(self.decay_down(x)).to(state_dtype(x.dtype))
        return (F.logsigmoid(logits) / self.normalizer).unflatten(-1, (self.heads, -1))

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        init.linear_attention(self.decay_down.weight)
        init.linear_attention(self.decay_up.weight)
        assert self.decay_up.bias is not None
        nn.init.zeros_(self.decay_up.bias)
