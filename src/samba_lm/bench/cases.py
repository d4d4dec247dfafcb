"""The operations that mix tokens, and the shapes they are timed at: scan, short convolution, attention, GLA."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from samba_lm.bench.operation import Case, Inputs, Operation, Outputs, Work
from samba_lm.ops.causal_conv1d import causal_conv1d
from samba_lm.ops.gla import gated_linear_attention
from samba_lm.ops.selective_scan import selective_scan
from samba_lm.ops.sliding_attention import sliding_attention

BF16 = torch.bfloat16
DTYPES = (torch.bfloat16, torch.float32)
"""Parity is checked in each; timed is the first."""


def scan_operation() -> Operation:
    """softplus, recurrence, skip and gate: u, delta, z, B, C in the compute dtype, A, D, delta_bias fp32."""
    shapes = ((8, 4096, 3072), (4, 4096, 4608), (1, 4096, 4096), (1, 32768, 4096), (1, 131072, 4096))
    return Operation(
        name="scan",
        run=_scan,
        reference=lambda inputs: _scan({**inputs, "backend": "reference"}),
        gradients=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state"),
        driven=("y",),
        small=_scan_small,
        cases=tuple(_scan_case(*shape) for shape in shapes),
    )


def _scan(inputs: Inputs) -> Outputs:
    y, state = selective_scan(**inputs)
    return {"y": y, "final state": state}


def _scan_inputs(
    batch: int, length: int, channels: int, states: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    # Steps of 0.001 to 0.1 as at the beginning of training, through the inverse of softplus.
    step = torch.exp(torch.rand(channels, device=device) * math.log(100.0) + math.log(1e-3))
    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -torch.arange(1.0, states + 1, device=device).expand(channels, -1).contiguous(),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": torch.ones(channels, device=device),
        "z": normal(batch, length, channels),
        "delta_bias": step + torch.log(-torch.expm1(-step)),
    }


def _scan_small(device: torch.device, dtype: torch.dtype) -> dict[str, Inputs]:
    packed = _scan_inputs(2, 131, 37, 16, device, dtype)
    packed["state"] = torch.randn(2, 37, 16, device=device)
    packed["resets"] = torch.rand(2, 131, device=device) < 0.05
    inputs = {"plain": _scan_inputs(2, 131, 40, 16, device, dtype), "state and documents": packed}
    if device.type == "cuda":  # there the number and the length of rows decide how they are cut
        inputs["many rows"] = _scan_inputs(72, 37, 320, 16, device, dtype)
        inputs["a long row"] = _scan_inputs(1, 4096, 40, 16, device, dtype)
    return inputs


def _scan_case(batch: int, length: int, channels: int, states: int = 16) -> Case:
    n, small = batch * length * channels, batch * length * states
    final = 4 * batch * channels * states
    forward = Work(2 * (4 * n + 2 * small) + final, n * (7 * states + 10))
    return Case(
        f"({batch}, {length}, {channels}) N {states}",
        lambda device: _scan_inputs(batch, length, channels, states, device, BF16),
        {
            "forward": forward,
            "inference": forward,
            "backward": Work(2 * (7 * n + 4 * small), n * (17 * states + 25)),
        },
    )


def conv_operation() -> Operation:
    """Depthwise causal convolution with SiLU, channels-last."""
    return Operation(
        name="conv",
        run=_conv,
        reference=lambda inputs: _conv({**inputs, "backend": "reference"}),
        gradients=("x", "weight", "bias", "state"),
        driven=("y",),
        small=_conv_small,
        cases=(_conv_case(8, 4096, 3072), _conv_case(1, 131072, 4096)),
    )


def _conv(inputs: Inputs) -> Outputs:
    y, state = causal_conv1d(**inputs)
    return {"y": y, "final state": state}


def _conv_inputs(batch: int, length: int, channels: int, k: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        "x": torch.randn(batch, length, channels, device=device, dtype=dtype),
        # The master weights, as in training.
        "weight": torch.randn(channels, k, device=device) * k**-0.5,
        "bias": torch.randn(channels, device=device),
    }


def _conv_small(device: torch.device, dtype: torch.dtype) -> dict[str, Inputs]:
    packed = _conv_inputs(2, 131, 37, 4, device, dtype)
    packed["state"] = torch.randn(2, 3, 37, device=device, dtype=dtype)
    # Each row goes on with its document at position 5 and begins another.
    steps, begin = torch.arange(131, device=device), torch.tensor([[40], [2]], device=device)
    packed["positions"] = torch.where(steps < begin, steps + 5, steps - begin)
    return {"plain": _conv_inputs(2, 131, 40, 4, device, dtype), "state and documents": packed}


def _conv_case(batch: int, length: int, channels: int, k: int = 4) -> Case:
    n = batch * length * channels
    return Case(
        f"({batch}, {length}, {channels}) k {k}",
        lambda device: _conv_inputs(batch, length, channels, k, device, BF16),
        {"forward": Work(4 * n, n * (2 * k + 5)), "backward": Work(6 * n, n * (6 * k + 10))},
    )


def attention_operation() -> Operation:
    """Softmax attention over a window, with grouped KV heads."""
    return Operation(
        name="attention",
        run=_attention,
        reference=lambda inputs: _attention({**inputs, "backend": "reference"}),
        gradients=("q", "k", "v"),
        driven=("y",),
        small=_attention_small,
        cases=(
            _attention_case(8, 4096, 12, 12, 128, 2048, backward=True),
            _attention_case(1, 131072, 32, 4, 64, 2048, backward=False),
        ),
        matmul=True,
    )


def _attention(inputs: Inputs) -> Outputs:
    return {"y": sliding_attention(**inputs)}


def _attention_inputs(
    batch: int, length: int, heads: tuple[int, int], dim: int, window: int, device: torch.device, dtype: torch.dtype,
    past: int = 0,
) -> Inputs:  # fmt: skip
    H, G = heads
    return {
        "q": torch.randn(batch, length, H, dim, device=device, dtype=dtype),
        "k": torch.randn(batch, past + length, G, dim, device=device, dtype=dtype),
        "v": torch.randn(batch, past + length, G, dim, device=device, dtype=dtype),
        "window": window,
    }


def _attention_small(device: torch.device, dtype: torch.dtype) -> dict[str, Inputs]:
    packed = _attention_inputs(2, 203, (8, 2), 64, 90, device, dtype, past=57)
    documents = torch.zeros(2, 57 + 203, dtype=torch.int64, device=device)
    documents[0, 120:], documents[1, 60:], documents[1, 240:] = 1, 1, 2
    documents[1, :20] = -1  # slots of the ring that hold nothing yet
    packed |= {"q_documents": documents[:, 57:].contiguous(), "k_documents": documents}
    return {
        "plain": _attention_inputs(2, 203, (4, 4), 128, 90, device, dtype),
        "grouped heads": _attention_inputs(1, 203, (8, 1), 64, 90, device, dtype),
        "past and documents": packed,
    }


def _attention_case(batch: int, length: int, H: int, G: int, K: int, window: int, backward: bool) -> Case:
    keys = window - window * (window - 1) / (2 * length)  # that a query sees, on average
    flops = round(4 * K * keys * length * batch * H)
    row = 2 * batch * length * K
    work = {"forward" if backward else "inference": Work(row * (2 * H + 2 * G), flops)}
    if backward:
        work["backward"] = Work(row * (4 * H + 4 * G), flops * 5 // 2)
    return Case(
        f"({batch}, {length}, {H}/{G} x {K}) w {window}",
        lambda device: _attention_inputs(batch, length, (H, G), K, window, device, BF16),
        work,
    )


def gla_operation() -> Operation:
    """Gated linear attention at the shape of sliding-gla-438m; our own path in PyTorch is no kernel worth timing."""
    return Operation(
        name="gla",
        run=_gla,
        reference=lambda inputs: _gla({**inputs, "backend": "reference"}),
        gradients=("q", "k", "v", "log_decay", "state"),
        driven=("y",),
        small=_gla_small,
        cases=(_gla_case(4, 4096, 4, 192, 384),),
        matmul=True,
        worth=lambda: importlib.util.find_spec("fla") is not None,
        unworthy="flash-linear-attention is not installed",
    )


def _gla(inputs: Inputs) -> Outputs:
    y, state = gated_linear_attention(**inputs)
    return {"y": y, "final state": state}


def _gla_inputs(batch: int, length: int, H: int, K: int, Kv: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "q": normal(batch, length, H, K) * K**-0.5,
        "k": normal(batch, length, H, K),
        "v": normal(batch, length, H, Kv),
        "log_decay": torch.nn.functional.logsigmoid(torch.randn(batch, length, H, K, device=device)) / 16,
    }


def _gla_small(device: torch.device, dtype: torch.dtype) -> dict[str, Inputs]:
    with_state = _gla_inputs(2, 131, 2, 24, 40, device, dtype)
    with_state["state"] = torch.randn(2, 2, 24, 40, device=device)
    return {"plain": _gla_inputs(2, 131, 2, 64, 64, device, dtype), "state": with_state}


def _gla_case(batch: int, length: int, H: int, K: int, Kv: int) -> Case:
    tokens = batch * length * H
    flops, row = 4 * tokens * K * Kv, 2 * tokens
    return Case(
        f"({batch}, {length}, {H} x {K}/{Kv})",
        lambda device: _gla_inputs(batch, length, H, K, Kv, device, BF16),
        {
            "forward": Work(row * (4 * K + 2 * Kv), flops),
            "backward": Work(row * (8 * K + 4 * Kv), 2 * flops),
        },
    )
