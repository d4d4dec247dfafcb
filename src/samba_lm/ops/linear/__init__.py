"""The product with a weight matrix, on the faster of PyTorch's two CPU libraries.

PyTorch gives fp32 products to MKL, which runs AMD processors at half the speed of their AVX-512 units; it gives
convolutions to oneDNN, which does not. A 1x1 convolution over channels-last data is the same product without moving a
byte, forward and backward: 1.9x the speed of MKL on an AMD EPYC (docs/log.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from samba_lm.ops.backend import Backend, choose

BACKENDS = ("reference", "cpu")
MIN_ROWS = 16
"""Fewer rows are bound by reading the weights, not by arithmetic."""


def _onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, on a PyTorch that has oneDNN."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


ONEDNN_IS_FASTER = _onednn_is_faster()


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: Backend = "auto"
) -> torch.Tensor:
    """x W^T + b: x [..., n_in], weight [n_out, n_in], bias [n_out] or None, all of one dtype. Returns [..., n_out].

    ``auto`` depends on the device, the dtype, the number of rows and the processor, never on a timing: the same call
    gives the same bits.
    """
    rows = x.numel() // x.shape[-1]
    if backend == "auto":
        fast = x.device.type == "cpu" and x.dtype == torch.float32 and rows >= MIN_ROWS and ONEDNN_IS_FASTER
    else:
        fast = choose(backend, BACKENDS, "linear", x) == "cpu"
    if not fast:
        return F.linear(x, weight, bias)
    image = x.reshape(1, rows, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, n_in, rows, 1], channels last in memory
    y = F.conv2d(image, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
