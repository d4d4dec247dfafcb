"""Multi-scale retention (RetNet, Sun et al. 2023), as the paper's Sliding RetNet uses it."""

from __future__ import annotations

import torch

from samba_lm.config import ModelConfig, Retention
from samba_lm.mixers.base import state_dtype
from samba_lm.mixers.linear_attention import LinearAttentionMixer
from samba_lm.mixers.registry import register_mixer
from samba_lm.ops.rope import rotate
from samba_lm.span import Span


@register_mixer(Retention)
class RetentionMixer(LinearAttentionMixer):
    """RoPE on q and k; head h forgets by gamma_h = 1 - 2^(-5-h) a token."""

    def __init__(self, spec: Retention, config: ModelConfig) -> None:
        super().__init__(spec, config)
        self.rope_base = spec.rope_base

    def queries_keys(self, x: torch.Tensor, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = super().queries_keys(x, span)
        cos, sin = span.angles(self.key_dim, self.rope_base)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        dtype = state_dtype(x.dtype)
        head = torch.arange(self.heads, device=x.device, dtype=dtype)
        return torch.log1p(-torch.exp2(-5 - head)).expand(*x.shape[:2], -1)[..., None]
