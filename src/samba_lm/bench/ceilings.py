"""What this GPU gives at best: its copy bandwidth and its bf16 matrix product, measured and not read off a sheet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from samba_lm.bench.gpu import Clock, release

COPY_BYTES, MATMUL_SIZE = 1 << 31, 8192


@dataclass(frozen=True)
class Ceilings:
    """Measured on this device, in this run."""

    copy: float
    """Bytes a second of a device-to-device copy, read and written bytes counted."""
    matmul: float
    """FLOP/s of a bf16 product of two square random matrices with fp32 accumulation."""

    def shares(self, ms: float, moved: int, flops: int, matmul: bool) -> dict[str, object]:
        """Rates of a work of ``moved`` bytes and ``flops``, and their shares of the ceilings.

        ``matmul``: whether the FLOPs are those of matrix products; otherwise no share of that ceiling is given.
        """
        seconds = ms / 1e3
        facts: dict[str, object] = {
            "bytes": moved,
            "flops": flops,
            "GB/s": moved / seconds / 1e9,
            "TFLOP/s": flops / seconds / 1e12,
            "of_copy": moved / seconds / self.copy,
        }
        return {**facts, "of_matmul": flops / seconds / self.matmul} if matmul else facts

    def record(self) -> dict[str, float]:
        """Plain data for JSON."""
        return {"copy_bytes_per_s": self.copy, "matmul_flops_per_s": self.matmul}


def measure_ceilings(
    clock: Clock, repeats: int = 20, copy_bytes: int = COPY_BYTES, size: int = MATMUL_SIZE
) -> Ceilings:
    """Medians of ``repeats`` copies of ``copy_bytes`` and products of two [size, size] matrices of random numbers."""
    copy = _copy(clock, copy_bytes, repeats)
    release(clock.device)
    matmul = _matmul(clock, size, repeats)
    release(clock.device)
    return Ceilings(2 * copy_bytes / (copy / 1e3), 2 * size**3 / (matmul / 1e3))


def _copy(clock: Clock, size: int, repeats: int) -> float:
    source = torch.randn(size // 4, device=clock.device)
    target = torch.empty_like(source)
    return clock.time(lambda: target.copy_(source), repeats).median


def _matmul(clock: Clock, size: int, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return clock.time(lambda: torch.mm(a, b, out=out), repeats).median
