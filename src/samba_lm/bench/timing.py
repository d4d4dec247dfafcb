"""What every benchmark here is made of: the best time of several, a figure with its bar, bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Figure:
    """One measured number. ``bar``: what it should reach, "at most" or "at least" as ``low_is_good`` says."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    low_is_good: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the bar was reached; None without one."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.low_is_good else self.value >= self.bar


class ParityError(RuntimeError):
    """Two ways that must agree do not: a speed would mean nothing."""


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def require_close(actual: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> float:
    """The largest difference relative to the largest magnitude. Raises ParityError above ``bound`` or for NaN."""
    off = ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    if not off <= bound:
        raise ParityError(f"{what}: off by {off:.2e} of the largest magnitude, allowed {bound:.0e}")
    return off


def matvec_bandwidth(rows: int, columns: int, total_bytes: int, repeats: int = 5) -> float:
    """Bytes a second that products of one vector with fp32 matrices [rows, columns] read, no matrix used twice.

    ``total_bytes`` of matrices in all, so that none is still in a cache from the round before.
    """
    count = max(2, total_bytes // (4 * rows * columns))
    weights = [torch.randn(rows, columns) for _ in range(count)]
    x = torch.randn(1, columns)

    def run() -> None:
        for weight in weights:
            F.linear(x, weight)

    with torch.inference_mode():
        return count * 4 * rows * columns / best(run, repeats)
