"""What GLA and retention share: q, k, v, gate and output projections, and the gated per-head norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from samba_lm.config import LinearAttentionSpec, ModelConfig
from samba_lm.mixers.base import Mixer, Tensors, state_dtype
from samba_lm.nn.init import Init
from samba_lm.nn.linear import Linear
from samba_lm.nn.norm import RMSNorm
from samba_lm.ops.gla import gated_linear_attention
from samba_lm.span import Span


class LinearAttentionMixer(Mixer):
    """o = W_o(RMSNorm_head(q_t S_t / sqrt(K)) * SiLU(W_g x)). State: ``kv`` [B, H, K, Kv] in fp32.

    One norm weight of a head's value width serves all heads.
    """

    reads_parts = True

    def __init__(self, spec: LinearAttentionSpec, config: ModelConfig) -> None:
        super().__init__()
        self.heads = spec.heads
        self.key_dim = spec.key_dim(config.d_model) // spec.heads
        self.value_dim = spec.value_dim(config.d_model) // spec.heads
        self.q_proj = Linear(config.d_model, spec.key_dim(config.d_model))
        self.k_proj = Linear(config.d_model, spec.key_dim(config.d_model))
        self.v_proj = Linear(config.d_model, spec.value_dim(config.d_model))
        self.g_proj = Linear(config.d_model, spec.value_dim(config.d_model))
        self.norm = RMSNorm(self.value_dim, eps=1e-5)  # its own, whatever the model's norm_eps (reference code)
        self.out_proj = Linear(spec.value_dim(config.d_model), config.d_model)

    def queries_keys(self, x: torch.Tensor, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [B, L, H, K]."""
        return self.q_proj(x).unflatten(-1, (self.heads, -1)), self.k_proj(x).unflatten(-1, (self.heads, -1))

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, H, K or 1], never positive, in fp32 at least."""
        raise NotImplementedError

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        q, k = self.queries_keys(x, span)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        log_decay = self.log_decay(x)

        def effect() -> tuple[torch.Tensor, torch.Tensor]:
            _, final = gated_linear_attention(k, k, v, log_decay, documents=span.documents, lengths=span.lengths)
            return final, log_decay.sum(1).exp()[..., None]

        o, kv = gated_linear_attention(
            q * self.key_dim**-0.5,
            k,
            v,
            log_decay,
            state=span.entered(tensors["kv"], effect),
            documents=span.documents,
            lengths=span.lengths,
        )
        o = self.norm(o).flatten(2) * F.silu(self.g_proj(x))
        return self.out_proj(o), {"kv": kv}

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        shape = (batch, self.heads, self.key_dim, self.value_dim)
        return {"kv": torch.zeros(shape, device=device, dtype=state_dtype(dtype))}

    def reset_parameters(self, init: Init) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            init.linear_attention(projection.weight)
        nn.init.ones_(self.norm.weight)
        init.linear_attention_output(self.out_proj.weight)
