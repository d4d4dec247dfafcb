"""Causal attention over a window of keys, with grouped KV heads, documents and a past."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.errors import UserError
from samba_lm.ops.backend import Backend, choose, compute_dtype, differentiable
from samba_lm.ops.shapes import require, require_rank
from samba_lm.ops.sliding_attention.cpu import attend_one_lse_cpu, attention_cpu, attention_cpu_lse
from samba_lm.ops.sliding_attention.reference import attention_reference, attention_reference_lse

BACKENDS = ("reference", "cpu", "triton")
MAX_WINDOW = 1 << 30
"""More is all keys; the kernels add to it in 32 bits."""


def sliding_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int | None,
    q_documents: torch.Tensor | None = None,
    k_documents: torch.Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Softmax attention in which a query sees the last ``window`` keys, its own included.

    Args:
        q: [B, L, H, K]. k: [B, P+L, G, K], v: [B, P+L, G, Kv]: P past keys, then one for each query; H a multiple of G
            (query head h uses key head h // (H / G)). The query at row i stands at key P + i.
        window: number of keys seen, or None for all.
        q_documents, k_documents: int64 [B, L] and [B, P+L]; only keys of the query's own document are seen. They
            must not decrease along a row, and a query must share its document with its own key.
        scale: of the scores; None: 1 / sqrt(K).

    Returns:
        [B, L, H, Kv] in q's dtype; scores and softmax in fp32 at least.

    Raises UserError for shapes, devices or dtypes that do not fit together, for a window below 1, and if ``backend`` is
    "triton" and the kernels cannot take the tensors ("auto" then takes PyTorch).
    """
    window, scale = _checked(q, k, v, window, q_documents, k_documents, scale)
    if q.shape[1] == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    chosen = choose(backend, BACKENDS, "sliding_attention", q)
    if chosen == "triton":
        from samba_lm.ops.sliding_attention.triton import attention_triton, unsupported

        reason = unsupported(q, k, v, scale)
        if reason is None:
            return attention_triton(q, k, v, window, q_documents, k_documents, scale)
        if backend == "triton":
            raise UserError(f"sliding_attention: the triton backend cannot take these tensors: {reason}")
    if chosen == "reference":
        dtype = compute_dtype(q)
        q_, k_, v_ = (t.to(dtype) for t in (q, k, v))
        return attention_reference(q_, k_, v_, window, q_documents, k_documents, scale).to(q.dtype)
    return attention_cpu(q, k, v, window, q_documents, k_documents, scale)


def sliding_attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int | None,
    q_documents: torch.Tensor | None = None,
    k_documents: torch.Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`sliding_attention`, and the log-sum-exp of the scores [B, L, H], fp32 at least.

    With it, attentions over different keys can be put together: see ``samba_lm.ops.self_extend: merge``. The triton
    backend has no gradient here: "auto" takes it only where none is asked for.
    """
    window, scale = _checked(q, k, v, window, q_documents, k_documents, scale)
    if q.shape[1] == 0:
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    chosen = choose(backend, BACKENDS, "sliding_attention_lse", q)
    if chosen == "triton":
        from samba_lm.ops.sliding_attention.triton import attention_triton_lse, unsupported

        reason = "they need gradients" if differentiable(q, k, v) else unsupported(q, k, v, scale)
        if reason is None:
            return attention_triton_lse(q, k, v, window, q_documents, k_documents, scale)
        if backend == "triton":
            raise UserError(f"sliding_attention_lse: the triton backend cannot take these tensors: {reason}")
    if chosen == "reference":
        dtype = compute_dtype(q)
        q_, k_, v_ = (t.to(dtype) for t in (q, k, v))
        out, lse = attention_reference_lse(q_, k_, v_, window, q_documents, k_documents, scale)
        return out.to(q.dtype), lse
    return attention_cpu_lse(q, k, v, window, q_documents, k_documents, scale)


def attend_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    filled: torch.Tensor | None,
    scale: float | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """One query against a cache of keys in any order: q [B, H, K], k [B, C, G, K], v [B, C, G, Kv].

    ``filled`` bool [B, C] marks the keys to see, one a row at least (None: all). Returns [B, H, Kv]. The triton backend
    serves decoding and has no gradient: "auto" takes it only where none is asked for.
    """
    scale = _checked_one(q, k, v, filled, scale)
    found = _one_by_triton("attend_one", q, k, v, filled, scale, backend)
    if found is not None:
        return found[0]
    grouped = q.unflatten(1, (k.shape[2], -1))  # [B, G, H/G, K]
    mask = None if filled is None else filled[:, None, None, :]
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.flatten(1, 2)


def attend_one_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    filled: torch.Tensor | None,
    scale: float | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`attend_one`, and the log-sum-exp of the scores [B, H], fp32 at least."""
    scale = _checked_one(q, k, v, filled, scale)
    found = _one_by_triton("attend_one_lse", q, k, v, filled, scale, backend)
    if found is not None:
        return found
    return attend_one_lse_cpu(q, k, v, filled, scale)


def _one_by_triton(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    filled: torch.Tensor | None,
    scale: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What :func:`attend_one_lse` returns; None where PyTorch is to compute it. Raises UserError as ``name``."""
    chosen = choose(backend, ("cpu", "triton"), name, q)
    if chosen != "triton" or (backend == "auto" and differentiable(q, k, v)):
        return None
    from samba_lm.ops.sliding_attention.triton import unsupported
    from samba_lm.ops.sliding_attention.triton_step import attend_one_triton

    reason = unsupported(q, k, v, scale)
    if reason is None:
        return attend_one_triton(q, k, v, filled, scale)
    if backend == "triton":
        raise UserError(f"{name}: the triton backend cannot take these tensors: {reason}")
    return None


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float | None,
) -> tuple[int | None, float]:
    """Compare everything; the window and the scale to compute with."""
    require_rank("sliding_attention", "q", q, "B, L, H, K")
    require_rank("sliding_attention", "v", v, "B, P+L, G, Kv")
    (batch, length, heads, width), (keys, groups) = q.shape, v.shape[1:3]
    require(
        "sliding_attention",
        q.device,
        k=(k, (batch, keys, groups, width)),
        v=(v, (batch, keys, groups, v.shape[3])),
        q_documents=(q_documents, (batch, length)),
        k_documents=(k_documents, (batch, keys)),
    )
    if keys < length or (q_documents is None) != (k_documents is None):
        raise UserError("sliding_attention: there must be a key for each query, and documents of both or of neither")
    _require_groups("sliding_attention", heads, groups)
    if window is not None and window < 1:
        raise UserError(f"sliding_attention: a window of {window} keys sees none: give at least 1, or None for all")
    return None if window is None else min(window, MAX_WINDOW), width**-0.5 if scale is None else scale


def _checked_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, filled: torch.Tensor | None, scale: float | None
) -> float:
    require_rank("attend_one", "q", q, "B, H, K")
    require_rank("attend_one", "v", v, "B, C, G, Kv")
    (batch, heads, width), (slots, groups) = q.shape, v.shape[1:3]
    require(
        "attend_one",
        q.device,
        k=(k, (batch, slots, groups, width)),
        v=(v, (batch, slots, groups, v.shape[3])),
        filled=(filled, (batch, slots)),
    )
    _require_groups("attend_one", heads, groups)
    return width**-0.5 if scale is None else scale


def _require_groups(operation: str, heads: int, groups: int) -> None:
    if groups < 1 or heads % groups:
        raise UserError(f"{operation}: {groups} key heads do not divide {heads} query heads")
