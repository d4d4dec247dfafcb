"""Windowed attention on the GPU: what the kernels take, how they are launched, and the custom ops around them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from samba_lm.ops.shapes import last_dense
from samba_lm.ops.sliding_attention.triton_backward import dkdv_kernel, dq_kernel
from samba_lm.ops.sliding_attention.triton_forward import forward_kernel

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MAX_WIDTH = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Blocks(NamedTuple):
    """How a kernel is cut: ``m`` queries and ``n`` keys a block, and the compiler's two numbers."""

    m: int
    n: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The three kernels' blocks."""

    forward: Blocks
    dq: Blocks
    dkdv: Blocks


def plan(width: int, dtype: torch.dtype) -> Plan:
    """The blocks for head dims of ``width``, from measurements on an H100."""
    if dtype == torch.float32:  # no tensor cores: what fits in registers
        if width <= 64:
            return Plan(Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1))
        if width <= 128:
            return Plan(Blocks(32, 32, 8, 1), Blocks(16, 16, 8, 1), Blocks(32, 32, 8, 1))
        return Plan(Blocks(16, 32, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1))
    if width <= 64:
        return Plan(Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))
    if width <= 128:
        return Plan(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))
    return Plan(Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 1), Blocks(32, 64, 8, 1))


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> str | None:
    """Why the kernels cannot take these, as a person would put it; None: they can."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k, v must share one of bf16, fp16, fp32, not {q.dtype}, {k.dtype}, {v.dtype}"
    if k.shape != v.shape or q.shape[-1] > MAX_WIDTH:
        return f"keys and values must have one head dim of at most {MAX_WIDTH}, not {k.shape[-1]} and {v.shape[-1]}"
    if q.numel() == 0:
        return "they are empty"
    if scale < 0:
        return f"scale must not be negative, and it is {scale}"
    return None


def attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Same arguments, result and meaning as ``attention_reference``, but documents must not decrease along a row."""
    return sliding_attention_forward(q, k, v, _first_keys(window, q_documents, k_documents), window or 0, scale)[0]


def attention_triton_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    q_documents: torch.Tensor | None,
    k_documents: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`attention_triton`, and the log-sum-exp [B, L, H], which has no gradient."""
    first = _first_keys(window, q_documents, k_documents)
    out, lse = sliding_attention_forward(q, k, v, first, window or 0, scale)
    return out, lse[:, :, : q.shape[1]].transpose(1, 2) * LN_2


def _first_keys(
    window: int | None, q_documents: torch.Tensor | None, k_documents: torch.Tensor | None
) -> torch.Tensor | None:
    if q_documents is None or k_documents is None:
        return None
    return first_keys(window, q_documents, k_documents)


def first_keys(window: int | None, q_documents: torch.Tensor, k_documents: torch.Tensor) -> torch.Tensor:
    """int32 [B, L]: the first key that each query sees, where its document begins or its window does."""
    first = torch.searchsorted(k_documents.contiguous(), q_documents.contiguous(), out_int32=True)
    if window is None:
        return first
    length, keys = q_documents.shape[1], k_documents.shape[1]
    begin = torch.arange(length, dtype=torch.int32, device=first.device) + (keys - length - window + 1)
    return torch.maximum(first, begin)


def seen_until(first: torch.Tensor, keys: int) -> torch.Tensor:
    """int32 [B, S]: one past the last query that sees each key."""
    j = torch.arange(keys, dtype=torch.int32, device=first.device).expand(first.shape[0], -1)
    return torch.searchsorted(first, j.contiguous(), right=True, out_int32=True)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor | None,
    window: int,
    scale: float,
    blocks: Blocks | None = None,
    tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, L, H, K] and the base-2 log-sum-exp fp32 [B, H, L rounded up to 16]; ``window`` 0: none."""
    q, k, v = (last_dense(x) for x in (q, k, v))
    batch, length, heads, dim = q.shape
    width = _width(dim)
    blocks = plan(width, q.dtype).forward if blocks is None else blocks
    m, n = blocks[:2]
    tma = _copied_by_tma(q, k, v) if tma is None else tma
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, _padded(length)), dtype=torch.float32)
    forward_kernel[(triton.cdiv(length, m) * batch * heads,)](
        _rows(q, m, width, tma),
        _rows(k, n, width, tma),
        _rows(v, n, width, tma),
        first,
        out,
        lse,
        *_sizes(q, k, lse, window, scale),
        *_strides(tma, q, k, v),
        FIRST=first is not None,
        enable_fp_fusion=True,
        **_constants(q, blocks, window, tma),
    )
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    first: torch.Tensor | None,
    window: int,
    scale: float,
    dq_blocks: Blocks | None = None,
    dkdv_blocks: Blocks | None = None,
    tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of what :func:`forward` gave, each contiguous."""
    dout, q, k, v = (last_dense(x) for x in (dout, q, k, v))
    delta = torch.empty_like(lse)
    dq = backward_dq(dout, q, k, v, out, lse, delta, first, window, scale, dq_blocks, tma)
    dk, dv = backward_dkdv(dout, q, k, v, lse, delta, first, window, scale, dkdv_blocks, tma)
    return dq, dk, dv


def backward_dq(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    first: torch.Tensor | None,
    window: int,
    scale: float,
    blocks: Blocks | None = None,
    tma: bool | None = None,
) -> torch.Tensor:
    """dq, and ``delta`` (as ``lse``) for the other kernel, which runs after this one."""
    batch, length, heads, dim = q.shape
    width = _width(dim)
    blocks = plan(width, q.dtype).dq if blocks is None else blocks
    m, n = blocks[:2]
    tma = _copied_by_tma(dout, q, k, v) if tma is None else tma
    dq = q.new_empty(q.shape)
    dq_kernel[(triton.cdiv(length, m) * batch * heads,)](
        _rows(q, m, width, tma),
        _rows(k, n, width, tma),
        _rows(v, n, width, tma),
        first,
        out,
        _rows(dout, m, width, tma),
        lse,
        delta,
        dq,
        *_sizes(q, k, lse, window, scale),
        *_strides(tma, q, k, v, dout),
        FIRST=first is not None,
        enable_fp_fusion=True,
        **_constants(q, blocks, window, tma),
    )
    return dq


def backward_dkdv(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    first: torch.Tensor | None,
    window: int,
    scale: float,
    blocks: Blocks | None = None,
    tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk, dv; ``delta`` as :func:`backward_dq` left it."""
    batch, keys, groups, dim = k.shape
    width = _width(dim)
    blocks = plan(width, q.dtype).dkdv if blocks is None else blocks
    m, n = blocks[:2]
    tma = _copied_by_tma(dout, q, k, v) if tma is None else tma
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dkdv_kernel[(triton.cdiv(keys, n) * batch * groups,)](
        _rows(q, m, width, tma),
        _rows(k, n, width, tma),
        _rows(v, n, width, tma),
        None if first is None else seen_until(first, keys),
        _rows(dout, m, width, tma),
        _numbers(lse, m, tma),
        _numbers(delta, m, tma),
        dk,
        dv,
        *_sizes(q, k, lse, window, scale),
        *_strides(tma, q, k, v, dout),
        SEEN=first is not None,
        enable_fp_fusion=True,
        **_constants(q, blocks, window, tma),
    )
    return dk, dv


@torch.library.custom_op("samba_lm::sliding_attention_forward", mutates_args=())
def sliding_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor | None, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`forward`."""
    with torch.cuda.device_of(q):
        return forward(q, k, v, first, window, scale)


@sliding_attention_forward.register_fake
def _(q, k, v, first, window, scale):
    lse = q.new_empty((q.shape[0], q.shape[2], _padded(q.shape[1])), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("samba_lm::sliding_attention_backward", mutates_args=())
def sliding_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    first: torch.Tensor | None,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`backward`."""
    with torch.cuda.device_of(q):
        return backward(dout, q, k, v, out, lse, first, window, scale)


@sliding_attention_backward.register_fake
def _(dout, q, k, v, out, lse, first, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, first, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, first)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, _):
    if dout is None:
        return (None,) * 6
    q, k, v, out, lse, first = ctx.saved_tensors
    return *sliding_attention_backward(dout, q, k, v, out, lse, first, ctx.window, ctx.scale), None, None, None


sliding_attention_forward.register_autograd(_gradients, setup_context=_save)


def _width(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _sizes(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, window: int, scale: float) -> tuple[int | float, ...]:
    """What every kernel takes behind its tensors, from ``length`` to ``scale``."""
    return q.shape[1], lse.shape[-1], k.shape[1], q.shape[2], k.shape[2], window, scale * LOG2_E


def _constants(q: torch.Tensor, blocks: Blocks, window: int, tma: bool) -> dict[str, int | bool]:
    """What every kernel is compiled for, and how."""
    m, n, warps, stages = blocks
    shape = {"DIM": q.shape[3], "WIDTH": _width(q.shape[3]), "BLOCK_M": m, "BLOCK_N": n}
    return {**shape, "WINDOW": window > 0, "TMA": tma, "num_warps": warps, "num_stages": stages}


def _padded(length):
    # A row of the log-sum-exp begins where the copy engine can begin: every 16 bytes, and divisible by 16 for Triton.
    return (length + 15) // 16 * 16


def _copied_by_tma(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can read these: it wants steps of 16 bytes. fp32 has no tensor cores to feed."""
    return tensors[0].dtype != torch.float32 and all(
        x.data_ptr() % 16 == 0 and all(_steps(s, n, x) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
        for x in tensors
    )


def _steps(stride: int, size: int, x: torch.Tensor) -> bool:
    return size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0)


def _rows(x: torch.Tensor, block: int, width: int, tma: bool) -> torch.Tensor | TensorDescriptor:
    """What ``load_rows`` takes for x [B, rows, heads, K]."""
    if not tma:
        return x
    x = x.transpose(1, 2)
    # The stride of a dimension of one may be anything, but the descriptor must hold a legal number.
    legal = 16 // x.element_size()
    strides = [s if n > 1 else max(legal, s // legal * legal) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, width])


def _numbers(x: torch.Tensor, block: int, tma: bool) -> torch.Tensor | TensorDescriptor:
    """What ``load_numbers`` takes for x [B, H, padded]."""
    assert not tma or block >= 32, "the copy engine writes to multiples of 128 bytes"
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block]) if tma else x


def _strides(tma: bool, *tensors: torch.Tensor) -> list[int]:
    return [0 if tma else x.stride(n) for x in tensors for n in (0, 1, 2)]
