"""Split of q, k, v and their rotation on the GPU in one pass over memory, and its transpose in another."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

HEADS = 8
"""Heads a program: an angle is read once for all of them."""
TILE = 2048
"""Pairs of numbers a program at most."""
WARPS = 4


@triton.jit
def _tile(
    cos_ptr, sin_ptr, tokens, angle_tokens, heads, groups,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """This program's tokens, heads and pairs as [TOKENS, HEADS, BLOCK]; which are inside; cos and sin of each."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :, None]
    pair = tl.arange(0, BLOCK)[None, None, :]
    inside = (token < tokens) & (head < heads + 2 * groups) & (pair < HALF)
    if cos_ptr is not None:
        at = (token % angle_tokens).to(tl.int64) * HALF + pair
        known = (token < tokens) & (pair < HALF)
        turned = head < heads + groups  # the values are not
        cos = tl.where(turned, tl.load(cos_ptr + at, mask=known, other=1.0).to(tl.float32), 1.0)
        sin = tl.where(turned, tl.load(sin_ptr + at, mask=known, other=0.0).to(tl.float32), 0.0)
    else:
        cos, sin = 1.0, 0.0
    return token.to(tl.int64), head, pair, inside, cos, sin


@triton.jit
def _place(token, head, pair, first, count, HALF: tl.constexpr):
    """Where in a tensor [tokens, count, K] a pair of head ``first`` + i begins, and whether that head is in it."""
    own = head - first
    return (token * count + own) * (2 * HALF) + pair, (own >= 0) & (own < count)


@triton.jit
def _forward(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, tokens, angle_tokens, heads, groups, stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, head, pair, inside, cos, sin = _tile(
        cos_ptr, sin_ptr, tokens, angle_tokens, heads, groups, HALF, BLOCK, TOKENS, HEADS
    )
    at = token * stride + head * (2 * HALF) + pair
    x1 = tl.load(qkv_ptr + at, mask=inside, other=0.0)
    x2 = tl.load(qkv_ptr + at + HALF, mask=inside, other=0.0)
    if cos_ptr is not None:
        a, b = x1.to(tl.float32), x2.to(tl.float32)
        x1 = (a * cos - b * sin).to(qkv_ptr.dtype.element_ty)
        x2 = (a * sin + b * cos).to(qkv_ptr.dtype.element_ty)
    at, own = _place(token, head, pair, 0, heads, HALF)
    tl.store(q_ptr + at, x1, mask=inside & own)
    tl.store(q_ptr + at + HALF, x2, mask=inside & own)
    at, own = _place(token, head, pair, heads, groups, HALF)
    tl.store(k_ptr + at, x1, mask=inside & own)
    tl.store(k_ptr + at + HALF, x2, mask=inside & own)
    at, own = _place(token, head, pair, heads + groups, groups, HALF)
    tl.store(v_ptr + at, x1, mask=inside & own)
    tl.store(v_ptr + at + HALF, x2, mask=inside & own)


@triton.jit
def _backward(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dqkv_ptr, tokens, angle_tokens, heads, groups,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, head, pair, inside, cos, sin = _tile(
        cos_ptr, sin_ptr, tokens, angle_tokens, heads, groups, HALF, BLOCK, TOKENS, HEADS
    )
    # A head is in one of the three; the loads of the other two are masked off and cost nothing.
    at, own = _place(token, head, pair, 0, heads, HALF)
    y1 = tl.load(dq_ptr + at, mask=inside & own, other=0.0)
    y2 = tl.load(dq_ptr + at + HALF, mask=inside & own, other=0.0)
    at, own = _place(token, head, pair, heads, groups, HALF)
    y1 += tl.load(dk_ptr + at, mask=inside & own, other=0.0)
    y2 += tl.load(dk_ptr + at + HALF, mask=inside & own, other=0.0)
    at, own = _place(token, head, pair, heads + groups, groups, HALF)
    y1 += tl.load(dv_ptr + at, mask=inside & own, other=0.0)
    y2 += tl.load(dv_ptr + at + HALF, mask=inside & own, other=0.0)
    if cos_ptr is not None:
        a, b = y1.to(tl.float32), y2.to(tl.float32)
        y1 = (a * cos + b * sin).to(dqkv_ptr.dtype.element_ty)
        y2 = (b * cos - a * sin).to(dqkv_ptr.dtype.element_ty)
    at = (token * (heads + 2 * groups) + head) * (2 * HALF) + pair
    tl.store(dqkv_ptr + at, y1, mask=inside)
    tl.store(dqkv_ptr + at + HALF, y2, mask=inside)


def tile(tokens: int, heads: int, groups: int, half: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the kernels' shape constants."""
    block = triton.next_power_of_2(half)
    together = max(1, TILE // (HEADS * block))
    grid = (triton.cdiv(tokens, together), triton.cdiv(heads + 2 * groups, HEADS))
    return grid, {"HALF": half, "BLOCK": block, "TOKENS": together, "HEADS": HEADS}


def rotate_split_triton(
    qkv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, heads: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments, results and meaning as ``rotate_split``."""
    return _rotate_split(qkv, cos, sin, heads, groups)


def _angles(cos: torch.Tensor | None, sin: torch.Tensor | None) -> tuple[Any, Any, int]:
    """The angles as contiguous rows, and how many rows there are before they repeat."""
    if cos is None or sin is None:
        return None, None, 1
    return cos.contiguous(), sin.contiguous(), cos.shape[0] * cos.shape[1]


def _outputs(qkv: torch.Tensor, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, width = qkv.shape
    sizes = (heads, groups, groups)
    q, k, v = (qkv.new_empty(batch, length, size, width // (heads + 2 * groups)) for size in sizes)
    return q, k, v


@torch.library.custom_op("samba_lm::rotate_split", mutates_args=())
def _rotate_split(
    qkv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, heads: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = _outputs(qkv, heads, groups)
    rows = qkv.reshape(-1, qkv.shape[-1])  # a view where rows lie evenly apart
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    cos, sin, angle_tokens = _angles(cos, sin)
    tokens = rows.shape[0]
    grid, constants = tile(tokens, heads, groups, q.shape[-1] // 2)
    if tokens:
        with torch.cuda.device_of(qkv):
            _forward[grid](
                rows, cos, sin, q, k, v, tokens, angle_tokens, heads, groups, rows.stride(0), **constants,
                enable_fp_fusion=True, num_warps=WARPS,
            )  # fmt: skip
    return q, k, v


@_rotate_split.register_fake
def _(qkv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, heads: int, groups: int) -> Any:
    return _outputs(qkv, heads, groups)


@torch.library.custom_op("samba_lm::rotate_split_backward", mutates_args=())
def _rotate_split_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> torch.Tensor:
    dqkv = _joined(dq, dk)
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    cos, sin, angle_tokens = _angles(cos, sin)
    tokens, heads, groups = dq.shape[0] * dq.shape[1], dq.shape[2], dk.shape[2]
    grid, constants = tile(tokens, heads, groups, dq.shape[-1] // 2)
    if tokens:
        with torch.cuda.device_of(dq):
            _backward[grid](
                dq,
                dk,
                dv,
                cos,
                sin,
                dqkv,
                tokens,
                angle_tokens,
                heads,
                groups,
                **constants,
                enable_fp_fusion=True,
                num_warps=WARPS,
            )
    return dqkv


def _joined(dq: torch.Tensor, dk: torch.Tensor) -> torch.Tensor:
    batch, length, heads, width = dq.shape
    return dq.new_empty(batch, length, (heads + 2 * dk.shape[2]) * width)


@_rotate_split_backward.register_fake
def _(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> Any:
    return _joined(dq, dk)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _grad(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _rotate_split_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


_rotate_split.register_autograd(_grad, setup_context=_setup)
