"""SelfExtend on full attention: the rival that reads past its trained length without training (paper, figures 2, 4)."""

from __future__ import annotations

import torch

from samba_lm.config import SelfExtend
from samba_lm.mixers import kv_cache
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.base import Tensors
from samba_lm.mixers.registry import register_mixer
from samba_lm.ops.self_extend import self_extend_attention
from samba_lm.span import Span


@register_mixer(SelfExtend)
class SelfExtendMixer(AttentionMixer):
    """Its cache holds keys before rotation, since a key's angle depends on how far the query is."""

    spec: SelfExtend

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        (q, k, v), _ = self.project(x, tensors, span, rope=False)
        cache = kv_cache.grow(tensors, span, self.max_context)
        k_past, v_past, past_documents = kv_cache.past(cache, span, cache["k"].shape[1])
        count = k_past.shape[1]
        begin = span.start.position[:, None] + torch.arange(-count, 0, device=x.device)
        k_positions = torch.cat((begin, span.positions.expand(x.shape[0], -1)), dim=1)
        documents = k_positions.new_zeros(x.shape[0], span.length) if span.documents is None else span.documents
        if past_documents is None:
            past_documents = torch.zeros_like(begin)
        k_documents = torch.cat((past_documents, documents), dim=1)
        row = torch.arange(span.length, device=x.device)[:, None] + count
        causal = torch.arange(count + span.length, device=x.device) <= row
        y = self_extend_attention(
            q,
            torch.cat((k_past.to(k.dtype), k), dim=1),
            torch.cat((v_past.to(v.dtype), v), dim=1),
            span.positions,
            k_positions,
            causal & (documents[:, :, None] == k_documents[:, None, :]),
            group=self.spec.group,
            neighbor_window=self.spec.neighbor_window,
            base=self.spec.rope_base,
        )
        return self.out_proj(y.flatten(2)), kv_cache.update(cache, k, v, span)
