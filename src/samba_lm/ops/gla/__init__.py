"""Linear attention with decay (GLA, and retention as its case of one fixed decay a head)."""

from __future__ import annotations

import torch

from samba_lm.ops.backend import HAS_FLA, Backend, choose, compute_dtype
from samba_lm.ops.gla.cpu import gla_cpu
from samba_lm.ops.gla.reference import gla_reference

BACKENDS = ("reference", "cpu", "fla")


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t;  o_t = q_t S_t (the current token is not decayed).

    Args:
        q, k: [B, L, H, K], v: [B, L, H, Kv], log_decay: [B, L, H, K] or [B, L, H, 1], never positive.
        state: [B, H, K, Kv] or None for zeros.
        documents: int64 [B, L] ids that change where a new document starts; 0 continues the state's document.
        lengths: int64 [B]; tokens from there on are padding and leave the state as it is.
        backend: see ``samba_lm.ops.backend``. ``fla`` is the optional flash-linear-attention, which ``auto`` takes for
            bf16 and fp16 on a CUDA GPU where it is installed.

    Returns:
        o [B, L, H, Kv] in v's dtype and the final state, in fp32 (fp64 if any input is fp64).
    """
    chosen = choose(backend, _available(backend, q, k, v), "gated_linear_attention", q)
    dtype = compute_dtype(q, k, v, state)
    q_, k_, v_ = (q, k, v) if chosen == "fla" else (t.to(dtype) for t in (q, k, v))
    g_ = log_decay.to(dtype)
    if lengths is not None:
        padding = torch.arange(q.shape[1], device=q.device) >= lengths[:, None]
        k_, g_ = (t.masked_fill(padding[..., None, None], 0.0) for t in (k_, g_))
        if documents is not None:  # padding belongs to the last document, so that it does not reset the state
            last = documents.gather(1, (lengths - 1).clamp(min=0)[:, None]) * (lengths > 0)[:, None]
            documents = torch.where(padding, last, documents)
    if state is None:
        state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], device=q.device)
    if chosen == "fla":
        from samba_lm.ops.gla.external import gla_fla

        run = gla_fla
    else:
        run = {"reference": gla_reference, "cpu": gla_cpu}[chosen]
    out, final = run(q_, k_, v_, g_, state.to(dtype), documents)
    return out.to(v.dtype), final


def _available(backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[str, ...]:
    """The backends that ``auto`` may choose among, or all to choose one by name."""
    if backend != "auto":
        return BACKENDS
    from samba_lm.ops.gla.external import supported

    return BACKENDS if HAS_FLA and supported(q, k, v) else BACKENDS[:-1]
