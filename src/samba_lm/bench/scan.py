"""The selective scan on the CPU: nanoseconds a token-channel, beside the plain loop's."""

from __future__ import annotations

import torch

from samba_lm.bench.figure import Figure
from samba_lm.bench.parity import require_close
from samba_lm.bench.timing import best
from samba_lm.ops.backend import Backend
from samba_lm.ops.selective_scan import selective_scan

Inputs = dict[str, torch.Tensor]


def inputs(batch: int, length: int, channels: int, state: int) -> Inputs:
    """What a Mamba layer gives the scan, fp32, requiring gradients."""
    r = torch.randn
    tensors = {
        "u": r(batch, length, channels),
        "delta": r(batch, length, channels) - 4.0,
        "A": -torch.arange(1.0, state + 1).expand(channels, -1).clone(),
        "B": r(batch, length, state),
        "C": r(batch, length, state),
        "D": torch.ones(channels),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def check(given: Inputs) -> float:
    """Outputs and every gradient of the fast path against the definition in fp64; the worst relative difference."""
    results = []
    compared: tuple[tuple[Backend, torch.dtype], ...] = (("reference", torch.float64), ("cpu", torch.float32))
    for backend, dtype in compared:
        cast = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}
        y, _ = _run(cast, backend)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(cast.values()))])
    names = ["y", *(f"gradient of {name}" for name in given)]
    return max(require_close(b, a, 1e-4, name) for name, a, b in zip(names, *results, strict=True))


def run_scan(batch: int = 1, length: int = 1024, channels: int = 2048, state: int = 16) -> list[Figure]:
    """Measure forward and forward+backward; the bars are for (1, 1024, 2048, N 16) on two cores."""
    off = check(inputs(batch, 65, 24, state))
    given = inputs(batch, length, channels, state)
    per = 1e9 / (batch * length * channels)

    def forward(backend: Backend) -> None:
        with torch.no_grad():
            _run(given, backend)

    def both(backend: Backend) -> None:
        y, _ = _run(given, backend)
        torch.autograd.grad(y.sum(), list(given.values()))

    fast, fast_both = best(lambda: forward("cpu"), 8), best(lambda: both("cpu"), 5)
    loop, loop_both = best(lambda: forward("reference"), 1), best(lambda: both("reference"), 1)
    shape = f"({batch}, {length}, {channels}, N {state})"
    return [
        Figure("parity: worst relative difference from fp64", off, "", 1e-4),
        Figure(f"scan {shape} forward", fast * per, "ns/token-channel", 20.0),
        Figure(f"scan {shape} forward+backward", fast_both * per, "ns/token-channel", 80.0),
        Figure("plain loop, forward, as a multiple", loop / fast, "x"),
        Figure("plain loop, forward+backward, as a multiple", loop_both / fast_both, "x"),
    ]


def _run(given: Inputs, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
    return selective_scan(given["u"], given["delta"], given["A"], given["B"], given["C"], given["D"], backend=backend)
