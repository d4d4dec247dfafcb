"""Causal softmax attention with grouped KV heads, over a sliding window or in full."""

from __future__ import annotations

import torch
from torch import nn

from samba_lm.config import Attention, ModelConfig
from samba_lm.mixers import kv_cache
from samba_lm.mixers.base import Mixer, Tensors, state_dtype
from samba_lm.mixers.registry import register_mixer
from samba_lm.nn.init import Init
from samba_lm.nn.linear import Linear
from samba_lm.ops.causal_conv1d import causal_conv1d
from samba_lm.ops.rope import rotate_split
from samba_lm.ops.sliding_attention import attend_one, sliding_attention
from samba_lm.span import Span


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Tensors,
    span: Span,
    window: int | None,
    scale: float | None = None,
) -> tuple[torch.Tensor, Tensors]:
    """Attention of the span's q [B, L, H, K] over its own k, v [B, L, G, *] and the cache, and the new cache.

    One token looks at the ring as it lies; several look at the past in order of time, joined with their own keys.
    """
    if span.length == 1:
        cache = kv_cache.update(cache, k, v, span)
        return attend_one(q[:, 0], cache["k"], cache["v"], kv_cache.filled(cache, span), scale)[:, None], cache
    k_past, v_past, past_documents = kv_cache.past(cache, k, v, span, None if window is None else window - 1)
    q_documents, k_documents = span.seen, None
    if q_documents is not None or (past_documents is not None and past_documents.numel()):
        batch = q.shape[0]
        if q_documents is None:
            q_documents = q.new_zeros(batch, span.length, dtype=torch.int64)
        if past_documents is None:
            past_documents = q.new_zeros(batch, k_past.shape[1], dtype=torch.int64)
        k_documents = torch.cat((past_documents, q_documents), dim=1)
    known = k_past.shape[1] > 0  # nothing before: no copy of k and v either
    y = sliding_attention(
        q,
        torch.cat((k_past.to(k.dtype), k), dim=1) if known else k,
        torch.cat((v_past.to(v.dtype), v), dim=1) if known else v,
        window=window,
        q_documents=q_documents,
        k_documents=k_documents,
        scale=scale,
    )
    return y, kv_cache.update(cache, k, v, span)


@register_mixer(Attention)
class AttentionMixer(Mixer):
    """Query i sees keys j of its document with 0 <= i - j < window. State: rings ``k``, ``v``; ``conv`` with +SC."""

    reads_parts = True
    recurrent = False

    @property
    def reach(self) -> int | None:
        return None if self.spec.window is None else self.spec.window - 1

    def __init__(self, spec: Attention, config: ModelConfig) -> None:
        super().__init__()
        self.spec, self.max_context = spec, config.max_context
        self.head_dim = spec.head_dim(config.d_model)
        self.qkv = Linear(config.d_model, spec.qkv_width(config.d_model))  # rows [Q; K; V]
        self.out_proj = Linear(config.d_model, config.d_model)
        if spec.short_conv is not None:
            self.conv_weight = nn.Parameter(torch.empty(self.qkv.weight.shape[0], spec.short_conv))

    def project(
        self, x: torch.Tensor, tensors: Tensors, span: Span, rope: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Tensors]:
        """q [B, L, H, K] and k, v [B, L, G, K], q and k rotated with ``rope``; and the convolution's state."""
        qkv, state = self.qkv(x), {}
        if self.spec.short_conv is not None:
            qkv, state["conv"] = causal_conv1d(
                qkv,
                self.conv_weight,
                state=span.before(qkv, tensors["conv"]),
                positions=span.tap_positions,
                lengths=span.lengths,
            )
        cos = sin = None
        if rope:
            cos, sin = span.angles(self.head_dim, self.spec.rope_base, state_dtype(x.dtype))
        return rotate_split(qkv, cos, sin, self.spec.heads, self.spec.groups), state

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        y, tensors = self.values(x, tensors, span)
        return self.out_proj(y), tensors

    def values(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        """What the last projection reads, [B, L, D], the heads side by side, and the new state."""
        (q, k, v), state = self.project(x, tensors, span, self.spec.rope)
        cache = tensors if self.spec.window is not None else kv_cache.grow(tensors, span, self.max_context)
        y, cache = attend(q, k, v, cache, span, self.spec.window)
        return y.flatten(2), {**cache, **state}

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        slots = self.spec.window or 0
        tensors = kv_cache.empty_cache(batch, slots, self.spec.groups, self.head_dim, self.head_dim, device, dtype)
        if self.spec.short_conv is not None:
            shape = (batch, self.spec.short_conv - 1, self.qkv.weight.shape[0])
            tensors["conv"] = torch.zeros(shape, device=device, dtype=dtype)
        return tensors

    def reset_parameters(self, init: Init) -> None:
        init.linear(self.qkv.weight)
        if self.spec.short_conv is not None:
            init.conv(self.conv_weight)
        init.output(self.out_proj.weight)
