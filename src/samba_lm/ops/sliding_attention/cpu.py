"""Windowed causal attention in blocks of queries, on PyTorch's fused attention: no score beyond the window is computed.

With a window, every block of queries meets the same band of keys, so all blocks run as one batched call. Without one,
blocks run one after another, each against the keys so far.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.ops.backend import compute_dtype

BLOCK = 256
"""Queries whose scores are held at once where a window does not say it."""
SMALLEST_BLOCK = 64
"""Queries of a block at least. With a window, blocks are a quarter of it: fewer scores outside of it, more calls."""


def attention_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Same arguments, result and meaning as ``attention_reference``."""
    length, keys = q.shape[1], k.shape[1]
    if window is None or window >= keys:
        return _full(q, k, v, q_documents, k_documents, scale)
    block = min(max(SMALLEST_BLOCK, min(window // 4, BLOCK)), length)
    n_blocks = -(-length // block)
    tail = n_blocks * block - length  # queries added at the end so that the last block is whole
    head = max(0, window - 1 - (keys - length))  # keys missing at the start of the first block's band
    drop = max(0, (keys - length) - (window - 1))  # keys that no query reaches
    band = window - 1 + block
    q = F.pad(q, (0, 0, 0, 0, 0, tail)).unflatten(1, (n_blocks, block))  # [B, n, block, H, K]
    k = F.pad(k[:, drop:], (0, 0, 0, 0, head, tail)).unfold(1, band, block)  # [B, n, G, K, band]
    v = F.pad(v[:, drop:], (0, 0, 0, 0, head, tail)).unfold(1, band, block)
    row = torch.arange(block, device=q.device)[:, None]
    column = torch.arange(band, device=q.device)
    allowed = ((column >= row) & (column < row + window))[None, None]  # [1, 1, block, band]: for all blocks
    batch = q.shape[0]
    if head:
        first_key = torch.arange(n_blocks, device=q.device)[:, None] * block - head
        allowed = allowed & ((column + first_key >= 0)[:, None] | (column == row + window - 1))[None]
    if q_documents is not None and k_documents is not None:
        q_docs = F.pad(q_documents, (0, tail), value=-9).unflatten(1, (n_blocks, block))
        k_docs = F.pad(k_documents[:, drop:], (head, tail), value=-9).unfold(1, band, block)
        allowed = allowed & (q_docs[..., None] == k_docs[:, :, None, :])
    if allowed.numel() > block * band:
        allowed = allowed.expand(batch, n_blocks, block, band)
    out = _sdpa(
        q.flatten(0, 1).transpose(1, 2),
        k.permute(0, 1, 2, 4, 3).flatten(0, 1),
        v.permute(0, 1, 2, 4, 3).flatten(0, 1),
        allowed.flatten(0, 1)[:, None],
        scale,
    )  # [B n, H, block, Kv]
    return out.transpose(1, 2).unflatten(0, (batch, n_blocks)).flatten(1, 2)[:, :length]


def _full(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if past == 0 and q_documents is None:
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    outs = []
    for start in range(0, length, BLOCK):  # keeps a block's mask small when the past is long
        stop = min(start + BLOCK, length)
        column = torch.arange(past + stop, device=q.device)
        allowed = (column <= torch.arange(start, stop, device=q.device)[:, None] + past)[None, None]
        if q_documents is not None and k_documents is not None:
            same = q_documents[:, start:stop, None] == k_documents[:, None, : past + stop]
            allowed = allowed & same[:, None]
        outs.append(_sdpa(q[:, :, start:stop], k[:, :, : past + stop], v[:, :, : past + stop], allowed, scale))
    return torch.cat(outs, dim=2).transpose(1, 2)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped)


def attention_cpu_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``attention_reference_lse``; PyTorch's fused attention keeps its sums."""
    length, keys, groups = q.shape[1], k.shape[1], k.shape[2]
    outs, sums = [], []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        end = keys - length + stop
        begin = 0 if window is None else max(0, keys - length + start - window + 1)
        row = torch.arange(start, stop, device=q.device)[:, None] + keys - length
        column = torch.arange(begin, end, device=q.device)
        allowed = (column <= row) if window is None else (column <= row) & (row - column < window)
        if q_documents is not None and k_documents is not None:
            allowed = allowed & (q_documents[:, start:stop, None] == k_documents[:, None, begin:end])
            allowed = allowed[:, None, None]
        queries = q[:, start:stop].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [B, G, H/G, block, K]
        out, lse = _attention(queries, k[:, begin:end], v[:, begin:end], allowed, scale)
        outs.append(out.permute(0, 3, 1, 2, 4).flatten(2, 3))
        sums.append(lse.permute(0, 3, 1, 2).flatten(2, 3))
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def attend_one_lse_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, filled: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``attend_one_lse``."""
    allowed = None if filled is None else filled[:, None, None, None]
    queries = q.unflatten(1, (k.shape[2], -1))[:, :, :, None]
    out, lse = _attention(queries, k, v, allowed, scale)
    return out[:, :, :, 0].flatten(1, 2), lse[:, :, :, 0].flatten(1, 2)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, G, H/G, n, K], k and v [B, S, G, *]: [B, G, H/G, n, *] in q's dtype and the log-sum-exp, fp32 at least."""
    wide = compute_dtype(q)
    keys, values = (x.to(wide).transpose(1, 2)[:, :, None] for x in (k, v))
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ values).to(q.dtype), lse
