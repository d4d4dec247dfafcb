"""Linear cross-entropy on a GPU: three matrix products and one kernel, in chunks of tokens.

The gradients are finished in the forward, while a chunk's logits are there, so the logits are made once; backward only
multiplies by the incoming scalar. A chunk's logits are fp32, as the products accumulate them; softmax minus one-hot
goes back to the tensor cores in the dtype of ``hidden``; the weight's gradient is summed over the chunks in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from samba_lm.ops.triton_math import LOG2_E, exp2

LOGITS_BYTES = 1 << 29
"""fp32 logits held at once: 4,096 tokens of a vocabulary of 32,000, where products are as fast as with more."""

ALIGN = 16
"""Rows of logits start at multiples of this many elements: wide loads, and fast products, for any vocabulary."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The op: hidden [N, D], weight [V, D], targets int64 [N]; the sum of losses, fp32."""
    grad = torch.is_grad_enabled()
    loss, _, _ = _linear_cross_entropy(
        hidden, weight, targets, ignore_index, grad and hidden.requires_grad, grad and weight.requires_grad
    )
    return loss


def chunk_rows(rows: int, vocab_size: int) -> int:
    """Rows of a chunk: within the budget, multiples of 256 where that allows, all chunks nearly equal."""
    most = max(1, LOGITS_BYTES // (4 * vocab_size))
    step = 256 if most >= 256 else 1
    chunks = triton.cdiv(max(rows, 1), most // step * step)
    return triton.cdiv(triton.cdiv(max(rows, 1), chunks), step) * step


@torch.library.custom_op("samba_lm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, and the gradients of it that are asked for (empty otherwise)."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    hidden, targets = hidden.contiguous(), targets.contiguous()
    w = weight.to(hidden.dtype).contiguous()
    d_hidden = torch.empty_like(hidden if hidden_grad else hidden[:0, 0])
    d_weight = torch.zeros_like(w if weight_grad else w[:0, 0], dtype=torch.float32)
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    chunk, width = chunk_rows(rows, vocab), triton.cdiv(vocab, ALIGN) * ALIGN
    held = min(chunk, rows)
    all_logits = torch.empty(held, width, dtype=torch.float32, device=hidden.device)
    all_logits[:, vocab:].zero_()
    grad = hidden_grad or weight_grad
    if pick(vocab)[1]:  # each row's gradient goes where its logits were: of 16 bits, into the first half
        all_d_logits = all_logits.view(hidden.dtype)
    else:
        all_d_logits = torch.empty(held if grad else 0, width, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        h = hidden[part]
        logits = all_logits[: h.shape[0], :vocab]
        d_logits = all_d_logits[: h.shape[0], :vocab]
        product(h, w.T, logits)
        softmax_loss(logits, targets[part], losses[part], d_logits if grad else None, ignore_index)
        if hidden_grad:
            torch.mm(d_logits, w, out=d_hidden[part])
        if weight_grad:
            product(d_logits.T, h, d_weight, accumulate=True)
    return losses.sum(), d_hidden, d_weight.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, ignore_index, hidden_grad, weight_grad):
    loss = hidden.new_empty((), dtype=torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if hidden_grad else (0,))
    d_weight = weight.new_empty(weight.shape if weight_grad else (0,))
    return loss, d_hidden, d_weight


def _save(ctx, inputs, output):
    _, d_hidden, d_weight = output
    ctx.wants = inputs[4:]
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.save_for_backward(d_hidden, d_weight)


def _backward(ctx, grad, *_):
    scaled = [
        _scale(saved, grad) if wanted else None for saved, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)
    ]
    return (*scaled, None, None, None, None)


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("samba_lm::scale", mutates_args=())
def _scale(x: Tensor, factor: Tensor) -> Tensor:
    """x times a fp32 scalar, in fp32: between a bf16 tensor and a scalar PyTorch would round the scalar to bf16."""
    out = torch.empty_like(x)
    torch.mul(x, factor.reshape(1), out=out)
    return out


@_scale.register_fake
def _(x, factor):
    return torch.empty_like(x)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a b, or out += a b: a [M, K] and b [K, N] of one dtype, out [M, N] fp32, never rounded to theirs."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=float(accumulate), out=out)
    elif not a.is_cuda:  # in the interpreter
        torch.addmm(out, a.float(), b.float(), beta=float(accumulate), out=out)
    elif accumulate:  # addmm would want the dtype of a and b for the addend too, in some versions of PyTorch
        torch.ops.aten.baddbmm.dtype_out(out[None], a[None], b[None], torch.float32, out=out[None])
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def softmax_loss(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    d_logits: Tensor | None,
    ignore_index: int,
    config: tuple[int, bool, int] | None = None,
) -> None:
    """losses [N] from logits [N, V] fp32, and where asked for d_logits [N, V] = softmax - one-hot.

    The stride of ``logits``, the padding included, is what may be read of its rows and written of those of
    ``d_logits``. The rows of ``d_logits`` may begin where those of ``logits`` do, if a program holds a whole row.
    """
    rows, vocab = logits.shape
    block, whole, warps = config or pick(vocab)
    with torch.cuda.device_of(logits):
        _softmax_loss[(rows,)](
            logits,
            targets,
            losses,
            d_logits,
            vocab,
            logits.stride(0),
            0 if d_logits is None else d_logits.stride(0),
            ignore_index,
            GRADIENT=d_logits is not None,
            BLOCK=block,
            WHOLE=whole,
            enable_fp_fusion=True,
            num_warps=warps,
        )


def pick(vocab: int) -> tuple[int, bool, int]:
    """Columns at a time, whether those are all (the row then stays in registers), warps."""
    if vocab <= 32768:
        block = max(128, triton.next_power_of_2(vocab))
        return block, True, max(1, block // 1024)  # 32 warps at most: a program has no more
    return 8192, False, 16


@triton.jit
def _load(logits, column, V, width):
    # Whole rows, padding included, so that loads are wide for any V. What stands for the padding is below any logit,
    # yet finite, so that no difference of two of them is NaN.
    x = tl.load(logits + column, mask=column < width, other=0.0)
    return tl.where(column < V, x * LOG2_E, -1e38)


@triton.jit
def _softmax_loss(
    logits,
    targets,
    losses,
    d_logits,
    V,
    width,  # of a row of logits with its padding
    d_stride,  # from one row of d_logits to the next
    ignore_index,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(targets + row)
    valid = target != ignore_index
    inside = (target >= 0) & (target < V)
    own = tl.load(logits + target, mask=inside, other=float("nan"))
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        x = _load(logits, lane, V, width)
        top = tl.max(x, 0)
        e = exp2(x - top)
        total = tl.sum(e, 0)
    else:
        # Each lane keeps its own maximum and sum, so that the lanes meet once a row.
        tops = tl.full([BLOCK], -3e38, tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            x = _load(logits, start + lane, V, width)
            gap = exp2(-tl.abs(x - tops))  # NaN when x is
            sums = tl.where(x > tops, sums * gap + 1.0, sums + gap)
            tops = tl.maximum(tops, x)
        top = tl.max(tops, 0)
        total = tl.sum(sums * exp2(tops - top), 0)
    log_sum = top + tl.log2(total)  # in units of log 2
    loss = log_sum / LOG2_E - own
    tl.store(losses + row, tl.where(valid, loss, 0.0))
    if GRADIENT:
        d_logits += row * d_stride
        if WHOLE:
            # This may be the memory of the row itself. Nothing of that is read any more: every load stands before the
            # reductions, at which all of the program's threads meet, and no other program reads the row.
            p = e * (1.0 / total)
            d = tl.where(valid, tl.where(lane == target, p - 1.0, p), 0.0)
            tl.store(d_logits + lane, d.to(d_logits.dtype.element_ty), mask=lane < width)
        else:
            for start in range(0, V, BLOCK):
                column = start + lane
                x = _load(logits, column, V, width)
                p = exp2(x - log_sum)
                d = tl.where(valid, tl.where(column == target, p - 1.0, p), 0.0)
                tl.store(d_logits + column, d.to(d_logits.dtype.element_ty), mask=column < width)
