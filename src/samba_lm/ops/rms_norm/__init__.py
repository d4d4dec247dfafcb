"""Root-mean-square normalisation, alone or with the addition to the residual stream that comes before it."""

from __future__ import annotations

import torch

from samba_lm.ops.backend import Backend, choose
from samba_lm.ops.rms_norm.reference import add_rms_norm_reference, rms_norm_reference
from samba_lm.ops.shapes import require

BACKENDS = ("reference", "triton")
MAX_WIDTH = 8192
"""A kernel holds a whole row in registers; ``auto`` leaves wider rows to PyTorch."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5, *, backend: Backend = "auto") -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, computed in fp32 at least.

    Args:
        x: [..., D]. weight: [D].
        backend: see ``samba_lm.ops.backend``.

    Returns:
        [..., D] in x's dtype. Differentiable in x and weight.
    """
    require("rms_norm", x.device, weight=(weight, x.shape[-1:]))
    if _backend(backend, x) == "reference":
        return rms_norm_reference(x, weight, eps)
    from samba_lm.ops.rms_norm.triton import rms_norm_triton

    return rms_norm_triton(x, weight, eps, x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = x + branch, and weight * total / sqrt(mean(total^2) + eps) over the last dim, in one pass over memory.

    Args:
        x: [..., D] the residual stream, fp32 (fp64 in fp64 models). branch: [..., D] what a layer adds to it, in any
            dtype; None: nothing, and total is x itself.
        weight: [D].
        dtype: of the normalised result.
        backend: see ``samba_lm.ops.backend``.

    Returns:
        total [..., D] in x's dtype and normed [..., D] in ``dtype``. Differentiable in x, branch and weight through
        both. Computed in fp32 at least. With a 16-bit ``dtype`` the kernels keep total / rms for backward in it,
        which is half the bytes and as exact as the gradient that arrives in 16 bits.
    """
    require("add_rms_norm", x.device, branch=(branch, x.shape), weight=(weight, x.shape[-1:]))
    if _backend(backend, x) == "reference":
        return add_rms_norm_reference(x, branch, weight, eps, dtype)
    from samba_lm.ops.rms_norm.triton import add_rms_norm_triton, rms_norm_triton

    if branch is None:
        return x, rms_norm_triton(x, weight, eps, dtype)
    return add_rms_norm_triton(x, branch, weight, eps, dtype)


def _backend(backend: Backend, x: torch.Tensor) -> str:
    if backend == "auto" and x.shape[-1] > MAX_WIDTH:
        return "reference"
    return choose(backend, BACKENDS, "rms_norm", x)
