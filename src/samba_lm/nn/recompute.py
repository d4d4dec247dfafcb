"""Tensors that backward makes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks


def remade(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> saved_tensors_hooks:
    """While this is open, operations that want ``tensor`` in their backward keep nothing: ``make()`` is asked there.

    ``make`` must give the same values, shape and strides, and should hold only what is kept anyway, detached. It runs
    without gradients, once for every operation that asked. Everything else is kept as ever. Eager mode only.
    """
    place = _place(tensor)  # the tensor itself must not be held

    def pack(saved: torch.Tensor) -> torch.Tensor | None:
        return None if _place(saved) == place else saved

    def unpack(kept: torch.Tensor | None) -> torch.Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return make()

    return saved_tensors_hooks(pack, unpack)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """What tells a tensor from every other that lives at the same time, but for other names of itself."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
