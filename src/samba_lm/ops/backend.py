"""Choosing between an operation's implementations."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

import torch

from samba_lm.errors import UserError

Backend = Literal["auto", "reference", "cpu", "triton", "cuda", "fla"]
"""``reference``: the plain definition. ``cpu``: vectorised PyTorch, no compiler needed, runs on any device.
``triton``: GPU kernels. ``cuda``: kernels in CUDA C++ for NVIDIA's, compiled by NVRTC at their first use. ``fla``:
flash-linear-attention's, an optional package. ``auto``: the fastest that this
operation has for the tensor's device and dtype."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Triton comes with PyTorch's CUDA builds for Linux, not with its CPU builds."""

HAS_FLA = importlib.util.find_spec("fla") is not None
"""flash-linear-attention: pip install "samba-lm[fla]"."""

GPU_ONLY = ("triton", "cuda", "fla")

MAX_ROWS = 65_535
"""Of a grid's second axis, on NVIDIA's GPUs."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors: how the tests check them without a GPU."""

_preferred: Literal["reference", "cpu", "triton"] | None = None


@contextlib.contextmanager
def preferring(backend: Literal["reference", "cpu", "triton"] | None) -> Iterator[None]:
    """Within it, ``auto`` means this backend, or the fastest in PyTorch where an operation lacks it; None: as ever.

    For comparing whole models with the definitions, on any device. It holds for the whole process, all its threads.
    """
    global _preferred
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def preferred() -> Literal["reference", "cpu", "triton"] | None:
    """What :func:`preferring` asks for at present."""
    return _preferred


def choose(backend: Backend, available: tuple[str, ...], operation: str, x: torch.Tensor, rows: int = 1) -> str:
    """The implementation to run on tensors like ``x``. ``available`` lists the operation's own, fastest last.

    ``rows``: the batch, where kernels give each row of it a place of its own in the grid's second axis.

    ``auto`` takes the kernels for CUDA tensors of 32 bits or fewer, and otherwise the fastest in PyTorch. Raises
    UserError for a backend that the operation lacks or that cannot run here.
    """
    if not x.is_floating_point():
        raise UserError(f"{operation} takes floating-point tensors, not {x.dtype}")
    if backend == "auto":
        plain = [name for name in available if name not in GPU_ONLY]
        if _preferred == "triton" and _preferred in available:
            _require_triton(operation, x)
            return _preferred
        if _preferred is not None:
            return _preferred if _preferred in plain else plain[-1]
        fits = HAS_TRITON and not INTERPRETED and x.is_cuda and x.dtype != torch.float64 and rows <= MAX_ROWS
        return available[-1] if fits else plain[-1]
    if backend not in available:
        raise UserError(f"{operation} has no backend {backend!r}; choose one of: auto, {', '.join(available)}")
    if backend in GPU_ONLY and rows > MAX_ROWS:
        raise UserError(f"{operation}: the {backend} backend takes batches of at most {MAX_ROWS}, and this is {rows}")
    if backend == "triton":
        _require_triton(operation, x)
    elif backend == "cuda":
        _require_cuda(operation, x)
    elif backend == "fla":
        _require_fla(operation, x)
    return backend


def _require_cuda(operation: str, x: torch.Tensor) -> None:
    from samba_lm.ops import nvrtc

    if not x.is_cuda:
        raise UserError(f"{operation}: the cuda backend needs tensors on a CUDA GPU, these are on {x.device}")
    if x.dtype == torch.float64:
        raise UserError(f"{operation}: the cuda backend computes in fp32; for fp64 use backend='cpu' or 'reference'")
    if problem := nvrtc.why_not():
        raise UserError(f"{operation}: the cuda backend {problem}")


def _require_triton(operation: str, x: torch.Tensor) -> None:
    if not HAS_TRITON:
        raise UserError(
            f"{operation}: the triton backend needs Triton, which comes with PyTorch's CUDA builds for Linux"
        )
    if not (x.is_cuda or INTERPRETED):
        raise UserError(
            f"{operation}: the triton backend needs tensors on a CUDA GPU, these are on {x.device} "
            "(to debug kernels on the CPU, start Python with TRITON_INTERPRET=1)"
        )
    if x.dtype == torch.float64:
        raise UserError(f"{operation}: the triton backend computes in fp32; for fp64 use backend='cpu' or 'reference'")


def _require_fla(operation: str, x: torch.Tensor) -> None:
    if not HAS_FLA:
        raise UserError(
            f"{operation}: the fla backend needs flash-linear-attention: pip install 'samba-lm[fla]', "
            "or choose another backend"
        )
    if not x.is_cuda or x.dtype == torch.float64:
        raise UserError(
            f"{operation}: the fla backend needs tensors of 32 bits or fewer on a CUDA GPU, "
            f"these are {x.dtype} on {x.device}"
        )


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """fp32 at least: fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def differentiable(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want gradients of an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
