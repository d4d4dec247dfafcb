"""Numbers to and from a GPU, which is not waited for before somebody needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in main memory, as a copy to this device with ``non_blocking=True`` wants it."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Arriving:
    """Copies of tensors in main memory: started at once, behind all work that the device was given before."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned, so without waiting
        self._event = torch.cuda.Event() if tensors[0].is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def lists(self) -> list[Any]:
        """Each tensor as a list, when all have come."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]
