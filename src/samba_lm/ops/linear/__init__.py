"""The product with a weight matrix, on the faster of PyTorch's two CPU libraries.

PyTorch gives fp32 products to MKL, which runs AMD processors at half the speed of their AVX-512 units; it gives
convolutions to oneDNN, which does not. A 1x1 convolution over channels-last data is the same product without moving a
byte, forward and backward: 1.9x the speed of MKL on an AMD EPYC (docs/log.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from samba_lm.ops.backend import Backend, choose, preferred

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
        fits = x.device.type == "cpu" and x.dtype == torch.float32 and rows >= MIN_ROWS
        fast = fits and ONEDNN_IS_FASTER and preferred() != "reference"
    else:
        fast = choose(backend, BACKENDS, "linear", x) == "cpu"
    if not fast:
        return F.linear(x, weight, bias)
    image = x.reshape(1, rows, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, n_in, rows, 1], channels last in memory
    # A dilation changes nothing about one tap, but without it a single thread's 1x1 convolution is not given to oneDNN.
    y = F.conv2d(image, weight[:, :, None, None], bias, dilation=(1, 2))
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def linear_halves(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of x W^T: x [..., n_in], weight [2 n, n_in] -> x W[:n]^T and x W[n:]^T, both [..., n].

    On a GPU these are two products, so that their gradients, which come from different places, need not be copied
    into one tensor first.
    """
    if not x.is_cuda:
        first, second = linear(x, weight).chunk(2, dim=-1)
        return first, second
    first, second = _halves(x.flatten(0, -2), weight)
    return first.unflatten(0, x.shape[:-1]), second.unflatten(0, x.shape[:-1])


@torch.library.custom_op("samba_lm::linear_halves", mutates_args=())
def _halves(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    upper, lower = weight.chunk(2)
    return x @ upper.t(), x @ lower.t()


@_halves.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], weight.shape[0] // 2)
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("samba_lm::linear_halves_backward", mutates_args=())
def _halves_backward(
    dfirst: torch.Tensor, dsecond: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, with_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and of the weight, the latter empty where it is not wanted."""
    upper, lower = weight.chunk(2)
    dx = (dfirst @ upper).addmm_(dsecond, lower)
    if not with_dweight:
        return dx, weight.new_empty(0)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for gradient, rows in zip((dfirst, dsecond), dweight.chunk(2), strict=True):
        torch.mm(gradient.t(), x, out=rows)
    return dx, dweight


@_halves_backward.register_fake
def _(
    dfirst: torch.Tensor, dsecond: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, with_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if with_dweight else (0,))


def _halves_setup(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: object) -> None:
    ctx.save_for_backward(*inputs)


def _halves_gradients(
    ctx: Any, dfirst: torch.Tensor, dsecond: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Of a frozen weight, beside an adapter, nobody wants the gradient, which would be half of backward's work.
    wanted = ctx.needs_input_grad[1]
    dx, dweight = _halves_backward(dfirst.contiguous(), dsecond.contiguous(), *ctx.saved_tensors, wanted)
    return dx, dweight if wanted else None


_halves.register_autograd(_halves_gradients, setup_context=_halves_setup)
