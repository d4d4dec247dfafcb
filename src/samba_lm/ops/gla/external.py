"""Gated linear attention by the kernels of flash-linear-attention (pip install "samba-lm[fla]"), on a CUDA GPU.

Their products take bf16 or fp16 operands; of fp32 ones they would keep the 10 bits of TF32, so ``auto`` leaves those to
``cpu``. They break the graph of torch.compile.
"""

from __future__ import annotations

import importlib.metadata
import re

import torch

CHUNKED_FROM = 16
"""Tokens from which chunks pay; fewer go one by one."""


def supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether ``auto`` may choose these kernels."""
    halves = q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    return halves and q.shape[-1] % 16 == 0 and v.shape[-1] % 16 == 0


def gla_fla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    documents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``gla_reference``, q, k, v in their own dtype; log_decay (its last dim may be 1) and state in fp32."""
    if documents is None:
        return _run(q, k, v, log_decay, state, None)
    # The kernels know documents as pieces of one long row, each with a state of its own before and after.
    batch, length = documents.shape
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    ends = torch.cat((starts, starts.new_full((1,), batch * length)))
    row = starts // length
    continues = (starts % length == 0) & (documents[row, 0] == 0)
    before = torch.where(continues[:, None, None, None], state[row], 0.0)
    q, k, v, log_decay = (t.flatten(0, 1)[None] for t in (q, k, v, log_decay))
    out, after = _run(q, k, v, log_decay, before, ends)
    last = first.sum(1).cumsum(0) - 1
    return out[0].unflatten(0, (batch, length)), after[last]


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    ends: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fla.ops.gla import chunk_gla, fused_recurrent_gla
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    chunked = q.shape[1] >= CHUNKED_FROM
    if chunked and log_decay.shape[-1] == 1 and _one_decay_is_wrong(q):
        log_decay = log_decay.expand(*log_decay.shape[:-1], q.shape[-1]).contiguous()
    if log_decay.shape[-1] == 1:
        run, decay = chunk_simple_gla if chunked else fused_recurrent_simple_gla, {"g": log_decay[..., 0]}
    elif chunked:
        run, decay = chunk_gla, {"g": log_decay}
    else:
        run, decay = fused_recurrent_gla, {"gk": log_decay}
    out, final = run(q, k, v, **decay, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=ends)
    return out, final.float()


def _one_decay_is_wrong(q: torch.Tensor) -> bool:
    """Whether the kernels for one decay a head refuse to go backward: Triton 3.4 to 3.7.0 miscompiles them for Hopper
    GPUs (flash-linear-attention's issue 640). Those for one decay a channel serve as well, at more memory."""
    if not (q.is_cuda and torch.is_grad_enabled()) or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    numbers = re.findall(r"\d+", importlib.metadata.version("triton"))
    return (3, 4, 0) <= tuple(int(number) for number in numbers[:3]) < (3, 7, 1)
