"""SelfExtend on full attention: the rival that reads past its trained length without training (paper, figures 2, 4)."""

from __future__ import annotations

import torch

from samba_lm.config import SelfExtend
from samba_lm.mixers import kv_cache
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.mixers.base import Tensors, state_dtype
from samba_lm.mixers.registry import register_mixer
from samba_lm.ops.rope import rope_angles, rotate_split
from samba_lm.ops.self_extend import grouped_positions, self_extend_attention, self_extend_one
from samba_lm.span import Span

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@register_mixer(SelfExtend)
class SelfExtendMixer(AttentionMixer):
    """State: ``k``, ``v`` of all positions, keys rotated by their grouped ones, and rings ``near_k``, ``near_v`` of the
    last neighbor_window positions, keys rotated by their own: a key is never rotated again."""

    spec: SelfExtend

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        near, far = self.rotated(self.qkv(x), span)
        ring = {"k": tensors["near_k"], "v": tensors["near_v"]}
        cache = kv_cache.grow({"k": tensors["k"], "v": tensors["v"]}, span, self.max_context)
        if span.length == 1:
            ring, cache = kv_cache.update(ring, *near[1:], span), kv_cache.update(cache, *far[1:], span)
            y = self._attend_one(near[0][:, 0], far[0][:, 0], ring, cache, span)[:, None]
        else:
            y = self._attend(near, far, ring, cache, span)
            ring, cache = kv_cache.update(ring, *near[1:], span), kv_cache.update(cache, *far[1:], span)
        return self.out_proj(y.flatten(2)), {**cache, "near_k": ring["k"], "near_v": ring["v"]}

    def rotated(self, qkv: torch.Tensor, span: Span) -> tuple[Triple, Triple]:
        """q, k, v as near keys and their queries have them, and as far ones have."""
        spec, dim, dtype = self.spec, self.head_dim, state_dtype(qkv.dtype)

        def grouped() -> list[tuple[torch.Tensor, torch.Tensor]]:
            both = grouped_positions(span.positions, spec.group, spec.neighbor_window)
            angles = [rope_angles(positions, dim, spec.rope_base) for positions in both]
            return [(cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)) for cos, sin in angles]

        of_queries, of_keys = span.once(
            ("grouped", dim, spec.rope_base, spec.group, spec.neighbor_window, dtype), grouped
        )
        near = rotate_split(qkv, *span.angles(dim, spec.rope_base, dtype), spec.heads, spec.groups)
        q, _, _ = rotate_split(qkv, *of_queries, spec.heads, spec.groups)
        _, k, v = rotate_split(qkv, *of_keys, spec.heads, spec.groups)
        return near, (q, k, v)

    def _attend(self, near: Triple, far: Triple, ring: Tensors, cache: Tensors, span: Span) -> torch.Tensor:
        n = self.spec.neighbor_window
        near_past = kv_cache.past(ring, *near[1:], span, n - 1)
        past = kv_cache.past(cache, *far[1:], span, None)
        documents, past_documents = span.seen, past[2]
        if documents is not None or (past_documents is not None and past_documents.numel()):
            batch, count = near[0].shape[0], past[0].shape[1]
            if documents is None:
                documents = span.positions.new_zeros(batch, span.length)
            if past_documents is None:
                past_documents = documents.new_zeros(batch, count)
            documents = torch.cat((past_documents, documents), dim=1)
        (q, k, v), (far_q, far_k, far_v) = near, far
        return self_extend_attention(
            (q, torch.cat((near_past[0].to(k.dtype), k), dim=1), torch.cat((near_past[1].to(v.dtype), v), dim=1)),
            (far_q, torch.cat((past[0].to(k.dtype), far_k), dim=1), torch.cat((past[1].to(v.dtype), far_v), dim=1)),
            neighbor_window=n,
            positions=span.positions,
            documents=documents,
        )

    def _attend_one(
        self, q: torch.Tensor, far_q: torch.Tensor, ring: Tensors, cache: Tensors, span: Span
    ) -> torch.Tensor:
        n = self.spec.neighbor_window
        return self_extend_one(
            (q, ring["k"], ring["v"], kv_cache.filled(ring, span)),
            (far_q, cache["k"], cache["v"], kv_cache.filled(cache, span, lag=n)),
            span.end.position > n,
        )

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        dims = self.spec.groups, self.head_dim, self.head_dim, device, dtype
        ring = kv_cache.empty_cache(batch, self.spec.neighbor_window, *dims)
        return {**kv_cache.empty_cache(batch, 0, *dims), "near_k": ring["k"], "near_v": ring["v"]}
