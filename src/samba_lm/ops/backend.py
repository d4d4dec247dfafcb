"""Choosing between an operation's implementations."""

from __future__ import annotations

from typing import Literal

import torch

from samba_lm.errors import UserError

Backend = Literal["auto", "reference", "cpu", "triton"]
"""``reference``: the plain definition. ``cpu``: vectorised PyTorch, no compiler needed, runs on any device.
``triton``: GPU kernels. ``auto``: the fastest that this operation has for the tensor's device."""


def choose(backend: Backend, available: tuple[str, ...], operation: str) -> str:
    """The implementation to run; ``auto`` takes the last (fastest) of ``available``. UserError for one it lacks."""
    if backend == "auto":
        return available[-1]
    if backend not in available:
        raise UserError(f"{operation} has no backend {backend!r}; choose one of: auto, {', '.join(available)}")
    return backend


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """fp32 at least: fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
