"""The gate of the SwiGLU MLP, alone or with the projection that follows it."""

from __future__ import annotations

import torch

from samba_lm.ops.backend import Backend, choose
from samba_lm.ops.linear import linear
from samba_lm.ops.shapes import require, require_rank, require_type
from samba_lm.ops.swiglu.reference import swiglu_reference

BACKENDS = ("reference", "triton")


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """SiLU(gate) * up, elementwise: two tensors [..., F] of one dtype, which it returns. Differentiable in both."""
    require("swiglu", gate.device, up=(up, gate.shape))
    require_type("swiglu", "up", up, gate.dtype)
    if choose(backend, BACKENDS, "swiglu", gate) == "reference":
        return swiglu_reference(gate, up)
    from samba_lm.ops.swiglu.triton import swiglu_triton

    return swiglu_triton(gate, up)


def swiglu_linear(gate_up: torch.Tensor, weight: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """(SiLU(gate) * up) W^T.

    Args:
        gate_up: [..., 2 F], the gate first. weight: [D, F], of the same dtype.
        backend: see ``samba_lm.ops.backend``.

    Returns:
        [..., D] in the same dtype. Differentiable in both. On the GPU only the two arguments are kept for backward,
        which computes SiLU(gate) * up again in the pass over memory that gives their gradient.
    """
    require_rank("swiglu_linear", "weight", weight, "D, F")
    D, F = weight.shape
    require("swiglu_linear", gate_up.device, gate_up=(gate_up, (*gate_up.shape[:-1], 2 * F)), weight=(weight, (D, F)))
    require_type("swiglu_linear", "weight", weight, gate_up.dtype)
    if choose(backend, BACKENDS, "swiglu_linear", gate_up) == "reference":
        gate, up = gate_up.chunk(2, dim=-1)
        return linear(swiglu_reference(gate, up), weight)
    from samba_lm.ops.swiglu.triton import swiglu_linear_triton

    return swiglu_linear_triton(gate_up, weight)
