"""CUDA graphs: work that a GPU is told of once, kernel by kernel, and then starts as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UP = 2
"""Runs before a capture: kernels are compiled, libraries open their handles."""


@dataclass(frozen=True)
class Graph(Generic[T]):
    """What was recorded by :meth:`record`.

    Attributes:
        result: what the recorded run returned; its tensors hold the newest replay's numbers.
    """

    _graph: torch.cuda.CUDAGraph
    result: T

    @classmethod
    def record(cls, run: Callable[[], T], moved: list[Tensor], pool: Any) -> Graph[T]:
        """Record what ``run`` does on the GPU, to be started by :meth:`replay`.

        ``moved``: what running changes and the next run reads; it is put back. ``pool``: of
        ``torch.cuda.graph_pool_handle()``, shared by graphs that never run at once.
        """
        kept, device = [tensor.clone() for tensor in moved], moved[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = run()
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor, before in zip(moved, kept, strict=True):
            tensor.copy_(before)
        return cls(graph, result)

    def replay(self) -> T:
        """Start it once more, and return at once: results come in the order of the stream."""
        self._graph.replay()
        return self.result
