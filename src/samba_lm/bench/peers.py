"""Others' kernels for the same operations, timed beside ours where they are installed. Imported where they are used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samba_lm.bench.cases_rows import cross_entropy_plain, rope_plain, swiglu_plain
from samba_lm.bench.environment import version
from samba_lm.bench.operation import Implementation, Inputs, Outputs

FLEX_BLOCK = 128


@dataclass(frozen=True)
class Peer:
    """One operation of another package."""

    operation: str
    name: str
    distribution: str
    load: Callable[[], Implementation]
    """Imports the package; raises ImportError where it is missing."""
    fits: Callable[[Inputs], bool] = lambda inputs: True
    """Whether it can do these inputs at all."""

    @property
    def label(self) -> str:
        """Its name with the installed version."""
        found = version(self.distribution)
        return self.name if found is None or self.distribution == "torch" else f"{self.name} {found}"


def _mamba_ssm() -> Implementation:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run(inputs: Inputs) -> Outputs:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        y, state = selective_scan_fn(*(inputs[name] for name in names), delta_softplus=True, return_last_state=True)
        return {"y": y, "final state": state}

    return Implementation(run, frozenset({"u", "delta", "B", "C", "z", "y"}))


def _causal_conv1d() -> Implementation:
    from causal_conv1d import causal_conv1d_fn

    def run(inputs: Inputs) -> Outputs:
        # Its fast path for channels-last data is chosen by the strides of this view.
        y = causal_conv1d_fn(inputs["x"].transpose(1, 2), inputs["weight"], inputs["bias"], activation="silu")
        return {"y": y.transpose(1, 2)}

    return Implementation(run)


def _fla_conv() -> Implementation:
    from fla.modules.causal_conv1d import causal_conv1d

    def run(inputs: Inputs) -> Outputs:
        y, _ = causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"], activation="silu", backend="triton")
        return {"y": y}

    return Implementation(run)


def _flash_attn() -> Implementation:
    from flash_attn import flash_attn_func

    def run(inputs: Inputs) -> Outputs:
        window = (inputs["window"] - 1, 0)
        return {"y": flash_attn_func(inputs["q"], inputs["k"], inputs["v"], causal=True, window_size=window)}

    return Implementation(run)


def _varlen() -> Implementation:
    from torch.nn.attention import varlen

    varlen_attn: Callable[..., Any] = varlen.varlen_attn
    # PyTorch 2.11 takes fewer KV heads without being told.
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def run(inputs: Inputs) -> Outputs:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        batch, length = q.shape[:2]
        rows = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
        packed = [t.flatten(0, 1) for t in (q, k, v)]
        window = (inputs["window"] - 1, 0)
        y: Tensor = varlen_attn(*packed, rows, rows, length, length, window_size=window, **options)
        return {"y": y.unflatten(0, (batch, length))}

    return Implementation(run)


def _sdpa() -> Implementation:
    masks: dict[tuple[int, int], Tensor] = {}

    def run(inputs: Inputs) -> Outputs:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        key = (q.shape[2], inputs["window"])
        if key not in masks:
            at = torch.arange(key[0], device=q.device)
            distance = at[:, None] - at
            masks[key] = (distance >= 0) & (distance < key[1])
        shared = q.shape[1] != k.shape[1]
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masks[key], enable_gqa=shared)
        return {"y": y.transpose(1, 2)}

    return Implementation(run)


def _flex() -> Implementation:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = _compiled(flex_attention)
    masks: dict[tuple[int, int], Any] = {}

    def run(inputs: Inputs) -> Outputs:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        key = (q.shape[2], inputs["window"])
        if key not in masks:
            masks[key] = window_blocks(*key, q.device)
        y = compiled(q, k, v, block_mask=masks[key], enable_gqa=q.shape[1] != k.shape[1])
        return {"y": y.transpose(1, 2)}

    return Implementation(run)


def window_blocks(length: int, window: int, device: torch.device, size: int = FLEX_BLOCK) -> Any:
    """FlexAttention's BlockMask of a causal window, made from block indices: no [L, L] mask is ever held."""
    from torch.nn.attention.flex_attention import BlockMask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    first = torch.arange(0, length, size, device=device)
    q, k = first[:, None], first[None, :]
    last_q, last_k = q + size - 1, k + size - 1
    seen = (k <= last_q) & (q - last_k < window)
    whole = (last_k <= q) & (last_q - k < window)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    partial_blocks, whole_blocks = listed(seen & ~whole), listed(whole)
    return BlockMask.from_kv_blocks(
        *partial_blocks, *whole_blocks, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(length, length)
    )


def _fla_norm() -> Implementation:
    from fla.modules.norm.layernorm import rms_norm

    def run(inputs: Inputs) -> Outputs:
        normed, total = rms_norm(
            inputs["branch"],
            inputs["weight"],
            None,
            residual=inputs["x"],
            eps=1e-5,
            prenorm=True,
            residual_in_fp32=True,
        )
        return {"total": total, "normed": normed}

    return Implementation(run)


def _fla_swiglu() -> Implementation:
    from fla.modules.activations import swiglu_linear

    def run(inputs: Inputs) -> Outputs:
        gate, up = inputs["gate_up"].chunk(2, dim=-1)
        return {"y": swiglu_linear(gate, up, inputs["weight"], None)}

    return Implementation(run)


def _fla_cross_entropy() -> Implementation:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    def run(inputs: Inputs) -> Outputs:
        weight = inputs["weight"].to(inputs["hidden"].dtype)
        return {"loss": fused_linear_cross_entropy_loss(inputs["hidden"], inputs["targets"], weight, reduction="sum")}

    return Implementation(run)


def _liger() -> Implementation:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(inputs: Inputs) -> Outputs:
        weight = inputs["weight"].to(inputs["hidden"].dtype)
        loss = liger_fused_linear_cross_entropy(inputs["hidden"], weight, inputs["targets"], reduction="sum")
        return {"loss": loss}

    return Implementation(run)


def _fla_gla() -> Implementation:
    from fla.ops.gla import chunk_gla

    def run(inputs: Inputs) -> Outputs:
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        y, state = chunk_gla(q, k, v, log_decay.to(q.dtype), scale=1.0, output_final_state=True)
        return {"y": y, "final state": state}

    return Implementation(run)


def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape, its backward such that a kept graph can be run again."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a donated buffer is gone after the first backward
    compiled: Callable[..., Any] = torch.compile(run, dynamic=False)
    return compiled


def _norm_plain(inputs: Inputs) -> Outputs:
    total = inputs["x"] + inputs["branch"]
    weight = inputs["weight"]
    normed = torch.nn.functional.rms_norm(total, weight.shape, weight, 1e-5).to(inputs["branch"].dtype)
    return {"total": total, "normed": normed}


def _short(inputs: Inputs) -> bool:
    return int(inputs["q"].shape[1]) <= 1 << 14  # its mask is [L, L]


PEERS = (
    Peer("scan", "mamba-ssm", "mamba-ssm", _mamba_ssm),
    Peer("conv", "causal-conv1d", "causal-conv1d", _causal_conv1d),
    Peer("conv", "FLA Triton conv", "fla-core", _fla_conv),
    Peer("attention", "flash-attn", "flash-attn", _flash_attn),
    Peer("attention", "FA2 in torch (varlen_attn)", "torch", _varlen),
    Peer("attention", "FlexAttention, compiled", "torch", _flex),
    Peer("attention", "SDPA with a mask", "torch", _sdpa, _short),
    Peer("gla", "FLA chunk_gla", "fla-core", _fla_gla),
    Peer("norm", "FLA rms_norm", "fla-core", _fla_norm),
    Peer("norm", "PyTorch, compiled", "torch", lambda: Implementation(_compiled(_norm_plain))),
    Peer("swiglu", "FLA swiglu_linear", "fla-core", _fla_swiglu),
    Peer("swiglu", "PyTorch, compiled", "torch", lambda: Implementation(_compiled(swiglu_plain))),
    Peer("rope", "PyTorch, compiled", "torch", lambda: Implementation(_compiled(rope_plain))),
    Peer("cross-entropy", "Liger fused linear cross-entropy", "liger-kernel", _liger),
    Peer("cross-entropy", "FLA fused linear cross-entropy", "fla-core", _fla_cross_entropy),
    Peer("cross-entropy", "PyTorch, all logits", "torch", lambda: Implementation(cross_entropy_plain)),
)
