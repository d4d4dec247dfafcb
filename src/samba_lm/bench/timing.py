"""Timing on the CPU: the best time of several, bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


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
