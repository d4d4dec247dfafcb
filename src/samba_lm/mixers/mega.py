"""Mega-S6: Mega's gated attention over chunks (Ma et al. 2022), its moving average replaced by short conv + S6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from samba_lm.config import MegaS6, ModelConfig
from samba_lm.mixers import kv_cache
from samba_lm.mixers.attention import attend
from samba_lm.mixers.base import Mixer, Tensors
from samba_lm.mixers.mamba import S6
from samba_lm.mixers.registry import register_mixer
from samba_lm.nn.init import Init
from samba_lm.nn.linear import Linear
from samba_lm.nn.norm import RMSNorm
from samba_lm.ops.rope import rotate
from samba_lm.span import Span


@register_mixer(MegaS6)
class MegaS6Mixer(Mixer):
    """Takes the raw residual stream x and returns u * (h - x), so that x + mixer(x) is Mega's gated residual.

    Attention is causal inside chunks of ``chunk`` tokens; the S6 scan runs over the whole document. The position bias
    bias[m, n] = rotate_m(alpha) . rotate_n(beta) is a product of features, so it joins q and k as extra dimensions.
    State: S6's ``conv`` and ``ssm``, and ``k``, ``v`` of the chunk being read.
    """

    reads_parts = True

    @property
    def reach(self) -> int | None:
        return self.spec.chunk - 1

    def __init__(self, spec: MegaS6, config: ModelConfig) -> None:
        super().__init__()
        D, Z = config.d_model, spec.z_dim
        self.spec, self.width = spec, D
        self.norm = RMSNorm(D, eps=1e-5)  # its own, whatever the model's norm_eps (reference code)
        self.s6 = S6(D, spec.rank(D), spec.state, spec.conv)
        self.v_proj = Linear(D, D, bias=True)
        self.mx_proj = Linear(D, 3 * D + Z, bias=True)  # rows [u: D; z: Z; r: D; hx: D]
        self.h_proj = Linear(D, D, bias=True)
        self.gamma = nn.Parameter(torch.empty(2, Z))
        self.beta = nn.Parameter(torch.empty(2, Z))
        self.position_alpha = nn.Parameter(torch.empty(Z))
        self.position_beta = nn.Parameter(torch.empty(Z))

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        D, Z = self.width, self.spec.z_dim
        n = self.norm(x)
        v = F.silu(self.v_proj(n))
        moved, s6_state = self.s6(n, None, tensors, span)
        u, zr, hx = self.mx_proj(F.silu(moved)).split((D, Z + D, D), dim=-1)
        z, r = F.silu(zr).split((Z, D), dim=-1)
        chunks = span.in_chunks(self.spec.chunk)
        q, k = self.queries_keys(z, chunks)
        o, cache = attend(q, k, v[:, :, None], tensors, chunks, self.spec.chunk, scale=1.0)
        h = F.silu(hx + self.h_proj(o[:, :, 0] * r))
        return torch.sigmoid(u) * (h - x), {**s6_state, **cache}

    def queries_keys(self, z: torch.Tensor, chunks: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [B, L, 1, 2 Z] of z [B, L, Z]: one head, whose scores are their products, the position bias in them."""
        width, dtype = self.spec.z_dim, z.dtype
        q = (z * self.gamma[0].to(dtype) + self.beta[0].to(dtype)) * width**-0.5
        k = z * self.gamma[1].to(dtype) + self.beta[1].to(dtype)
        cos, sin = (t[:, :, 0] for t in chunks.angles(width, 10_000.0))
        q_bias, k_bias = (rotate(p.to(dtype), cos, sin) for p in (self.position_alpha, self.position_beta))
        q = torch.cat((q, q_bias.expand_as(q)), dim=-1)[:, :, None]
        k = torch.cat((k, k_bias.expand_as(k)), dim=-1)[:, :, None]
        return q, k

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        cache = kv_cache.empty_cache(batch, self.spec.chunk, 1, 2 * self.spec.z_dim, self.width, device, dtype)
        return {**cache, **self.s6.init_tensors(batch, device, dtype)}

    def reset_parameters(self, init: Init) -> None:
        nn.init.ones_(self.norm.weight)
        self.s6.reset_parameters(init)
        for projection in (self.v_proj, self.mx_proj, self.h_proj):
            init.normal(projection.weight, 0.02)
            assert projection.bias is not None
            nn.init.zeros_(projection.bias)
        for p in (self.gamma, self.position_alpha, self.position_beta):
            init.normal(p, 0.02)
        nn.init.zeros_(self.beta)
