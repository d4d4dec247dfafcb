"""The operations on one token at a time, and the shapes they are timed at: norm, SwiGLU, RoPE, cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from samba_lm.bench.cases import BF16
from samba_lm.bench.operation import Case, Inputs, Operation, Outputs, Work
from samba_lm.ops.linear_cross_entropy import linear_cross_entropy
from samba_lm.ops.rms_norm import add_rms_norm
from samba_lm.ops.rope import rope_angles, rotate, rotate_split
from samba_lm.ops.swiglu import swiglu_linear

IGNORED = -100


def norm_operation() -> Operation:
    """Addition to the fp32 residual stream and RMSNorm to the compute dtype."""
    return Operation(
        name="norm",
        run=_norm,
        reference=_norm_reference,
        gradients=("x", "branch", "weight"),
        driven=("total", "normed"),
        small=lambda device, dtype: {
            "plain": _norm_inputs(131, 1536, device, dtype),
            "odd width": _norm_inputs(67, 203, device, dtype),
        },
        cases=(_norm_case(65536, 1536), _norm_case(65536, 2304)),
    )


def _norm(inputs: Inputs) -> Outputs:
    x, branch, weight = (inputs[name] for name in ("x", "branch", "weight"))
    total, normed = add_rms_norm(x, branch, weight, 1e-5, branch.dtype, backend=inputs.get("backend", "auto"))
    return {"total": total, "normed": normed}


def _norm_reference(inputs: Inputs) -> Outputs:
    total = inputs["x"] + inputs["branch"]
    return {"total": total, "normed": total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * inputs["weight"]}


def _norm_inputs(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        "x": torch.randn(rows, width, device=device),
        "branch": torch.randn(rows, width, device=device, dtype=dtype),
        "weight": torch.rand(width, device=device) + 0.5,
    }


def _norm_case(rows: int, width: int) -> Case:
    n = rows * width
    return Case(
        f"({rows}, {width})",
        lambda device: _norm_inputs(rows, width, device, BF16),
        # Forward: x, branch; total, normed. Backward: both gradients and the total in 16 bits; two gradients.
        {"forward": Work(12 * n, 5 * n), "backward": Work(14 * n, 9 * n)},
    )


def swiglu_operation() -> Operation:
    """SiLU(gate) * up and the down projection."""
    return Operation(
        name="swiglu",
        run=lambda inputs: {"y": swiglu_linear(**inputs)},
        reference=swiglu_plain,
        gradients=("gate_up", "weight"),
        driven=("y",),
        small=lambda device, dtype: {
            "plain": _swiglu_inputs(131, 136, 200, device, dtype),
            "odd width": _swiglu_inputs(67, 51, 77, device, dtype),
        },
        cases=(_swiglu_case(65536, 1536, 4096), _swiglu_case(32768, 2304, 6144)),
        matmul=True,
    )


def swiglu_plain(inputs: Inputs) -> Outputs:
    """The definition in PyTorch."""
    gate, up = inputs["gate_up"].chunk(2, dim=-1)
    return {"y": (F.silu(gate) * up) @ inputs["weight"].t()}


def _swiglu_inputs(rows: int, width: int, inner: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        "gate_up": torch.randn(rows, 2 * inner, device=device, dtype=dtype),
        "weight": torch.randn(width, inner, device=device, dtype=dtype) * inner**-0.5,
    }


def _swiglu_case(rows: int, width: int, inner: int) -> Case:
    flops = 2 * rows * width * inner
    return Case(
        f"({rows}, {width}) width {inner}",
        lambda device: _swiglu_inputs(rows, width, inner, device, BF16),
        {
            "forward": Work(2 * (2 * rows * inner + width * inner + rows * width), flops),
            "backward": Work(2 * (4 * rows * inner + 2 * width * inner + rows * width), 2 * flops),
        },
    )


def rope_operation() -> Operation:
    """Splitting q, k and v out of their projection, q and k rotated."""
    return Operation(
        name="rope",
        run=lambda inputs: dict(zip(("q", "k", "v"), rotate_split(**inputs), strict=True)),
        reference=rope_plain,
        gradients=("qkv",),
        driven=("q", "k", "v"),
        small=lambda device, dtype: {
            "plain": _rope_inputs(2, 67, 4, 4, 64, device, dtype),
            "grouped heads": _rope_inputs(2, 67, 6, 2, 40, device, dtype),
        },
        cases=(_rope_case(16, 4096, 12, 12, 128), _rope_case(1, 131072, 32, 4, 64)),
    )


def rope_plain(inputs: Inputs) -> Outputs:
    """The definition in PyTorch."""
    H, G, cos, sin = inputs["heads"], inputs["groups"], inputs["cos"], inputs["sin"]
    q, k, v = inputs["qkv"].unflatten(-1, (H + 2 * G, -1)).split((H, G, G), dim=2)
    return {"q": rotate(q, cos, sin), "k": rotate(k, cos, sin), "v": v.contiguous()}


def _rope_inputs(
    batch: int, length: int, H: int, G: int, K: int, device: torch.device, dtype: torch.dtype
) -> Inputs:  # fmt: skip
    cos, sin = rope_angles(torch.arange(length, device=device)[None, :, None], K, 10_000.0)
    qkv = torch.randn(batch, length, (H + 2 * G) * K, device=device, dtype=dtype)
    return {"qkv": qkv, "cos": cos, "sin": sin, "heads": H, "groups": G}


def _rope_case(batch: int, length: int, H: int, G: int, K: int) -> Case:
    n = batch * length * (H + 2 * G) * K
    turned = 3 * batch * length * (H + G) * K
    return Case(
        f"({batch}, {length}, {H}/{G} x {K})",
        lambda device: _rope_inputs(batch, length, H, G, K, device, BF16),
        {"forward": Work(4 * n, turned), "backward": Work(4 * n, turned)},
    )


def cross_entropy_operation() -> Operation:
    """The head and the loss; its gradients may be made in the forward pass, so the two are timed together."""
    return Operation(
        name="cross-entropy",
        run=lambda inputs: {"loss": linear_cross_entropy(**inputs)},
        reference=cross_entropy_plain,
        gradients=("hidden", "weight"),
        driven=("loss",),
        small=lambda device, dtype: {"plain": _cross_entropy_inputs(301, 96, 1001, device, dtype)},
        cases=(_cross_entropy_case(65536, 1536, 32000),),
        matmul=True,
    )


def cross_entropy_plain(inputs: Inputs) -> Outputs:
    """The definition in PyTorch: all logits at once, the softmax in fp32 at least."""
    logits = F.linear(inputs["hidden"], inputs["weight"].to(inputs["hidden"].dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return {"loss": F.cross_entropy(logits, inputs["targets"], reduction="sum", ignore_index=IGNORED)}


def _cross_entropy_inputs(rows: int, width: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    targets = torch.randint(0, vocab, (rows,), device=device)
    targets[:: rows // 7] = IGNORED
    return {
        "hidden": torch.randn(rows, width, device=device, dtype=dtype),
        # The master weight, as in training; rounded, so that fp64 sees the same one.
        "weight": (torch.randn(vocab, width, device=device) * width**-0.5).to(dtype).float(),
        "targets": targets,
    }


def _cross_entropy_case(rows: int, width: int, vocab: int) -> Case:
    moved = 2 * 2 * rows * width + 2 * 4 * vocab * width
    return Case(
        f"({rows}, {width}, {vocab})",
        lambda device: _cross_entropy_inputs(rows, width, vocab, device, BF16),
        {"both": Work(moved, 6 * rows * width * vocab)},
    )
