"""Gated linear attention in chunks: matrix products inside a chunk, one state update a chunk.

Only differences of the decays' running sums are exponentiated, and they are never positive, so nothing overflows
however fast the gates forget.
"""

from __future__ import annotations

import torch

CHUNK = 16


def gla_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    documents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``gla_reference``; log_decay's last dim may be 1 (one decay a head)."""
    outs = []
    carried = torch.zeros_like(documents[:, 0]) if documents is not None else None  # the document `state` belongs to
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        qc, kc, vc = q[:, part], k[:, part], v[:, part]
        G = log_decay[:, part].cumsum(1)  # [B, C, H, K or 1]
        causal = torch.ones(qc.shape[1], qc.shape[1], dtype=torch.bool, device=q.device).tril()[None, :, :, None]
        from_state, to_state = G.exp(), (G[:, -1:] - G).exp()
        keep = G[:, -1].exp()
        if documents is not None and carried is not None:
            docs = documents[:, part]
            causal = causal & (docs[:, :, None] == docs[:, None, :])[..., None]
            from_state = from_state.masked_fill((docs != carried[:, None])[..., None, None], 0.0)
            to_state = to_state.masked_fill((docs != docs[:, -1:])[..., None, None], 0.0)
            keep = keep.masked_fill((docs[:, -1] != carried)[:, None, None], 0.0)
            carried = docs[:, -1]
        gap = (G[:, :, None] - G[:, None, :]).masked_fill(~causal[..., None], float("-inf"))  # [B, C, C, H, K or 1]
        if gap.shape[-1] == 1:
            scores = torch.einsum("bihk,bjhk->bijh", qc, kc) * gap[..., 0].exp()
        else:
            scores = torch.einsum("bihk,bijhk,bjhk->bijh", qc, gap.exp(), kc)
        inside = torch.einsum("bijh,bjhv->bihv", scores, vc)
        outs.append(inside + torch.einsum("bihk,bhkv->bihv", qc * from_state, state))
        state = keep[..., None] * state + torch.einsum("bjhk,bjhv->bhkv", kc * to_state, vc)
    return torch.cat(outs, dim=1), state
