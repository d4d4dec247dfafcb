"""What this process writes of a checkpoint: its pieces of the model's and the optimizer's tensors, as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samba_lm.tensor_files import Piece
from samba_lm.train.parallel import Parallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor, parallel: Parallel) -> tuple[Tensor, tuple[int, ...]]:
    """What this process holds of a tensor, and where in the whole it begins."""
    sharded = _sharded(tensor, parallel)
    if sharded is None:
        return tensor, (0,) * tensor.ndim
    (chunk,) = sharded.__create_chunk_list__()
    local = sharded.to_local()
    # Of a process that got no rows, what it says of them is past the end.
    return local, tuple(chunk.offsets) if local.numel() else (0,) * local.ndim


def pieces(tensors: Mapping[str, Tensor], parallel: Parallel) -> list[Piece]:
    """The pieces that this process has to write, so that all processes together write every element once.

    Of replicas the first writes; a tensor that is not shared out is the main process's.
    """
    found = []
    for name, tensor in tensors.items():
        if not _writes(tensor, parallel):
            continue
        local, offsets = local_part(tensor.detach(), parallel)
        if local.numel():
            found.append(Piece(name, local.dtype, tuple(local.shape), offsets, partial(_same, local)))
    return found


def _writes(tensor: Tensor, parallel: Parallel) -> bool:
    sharded = _sharded(tensor, parallel)
    if sharded is None:
        return parallel.is_main
    from torch.distributed.tensor import Replicate

    where = sharded.device_mesh.get_coordinate()
    assert where is not None, "every process of a run is in its mesh"
    return all(n == 0 for n, place in zip(where, sharded.placements, strict=True) if isinstance(place, Replicate))


def _sharded(tensor: Tensor, parallel: Parallel) -> DTensor | None:
    if parallel.mesh is None:
        return None
    from torch.distributed.tensor import DTensor  # a second of imports

    return tensor if isinstance(tensor, DTensor) else None


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Staging:
    """Copies of pieces in the CPU's memory, which is kept for the next ones: page-locked where a GPU fills it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, kept: list[Piece]) -> list[Piece]:
        """The pieces as they are now, whatever becomes of their tensors; valid until the next call."""
        copies = []
        cuda = False
        for piece in kept:
            tensor = piece.get()
            cuda = cuda or tensor.is_cuda
            buffer = self._buffers.get(piece.name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[piece.name] = buffer
            buffer.copy_(tensor, non_blocking=True)
            copies.append(Piece(piece.name, piece.dtype, piece.shape, piece.offsets, partial(_same, buffer)))
        if cuda:
            torch.cuda.synchronize()
        return copies
