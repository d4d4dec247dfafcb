"""What an operation's tensors must be: a kernel would read past the end of one that is too small."""

from __future__ import annotations

import torch

from samba_lm.errors import UserError


def require(operation: str, device: torch.device, /, **tensors: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """Raise UserError unless each tensor, by its name, has the shape beside it and is on ``device``; None is fine."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != device):
            raise UserError(
                f"{operation}: {name} must be {list(shape)} on {device}, not {list(tensor.shape)} on {tensor.device}"
            )


def require_rank(operation: str, name: str, tensor: torch.Tensor, letters: str) -> None:
    """Raise UserError unless ``tensor`` has as many dims as ``letters``, such as "B, L, E", names."""
    if tensor.dim() != letters.count(",") + 1:
        raise UserError(f"{operation}: {name} must be [{letters}], not {list(tensor.shape)}")


def require_type(operation: str, name: str, tensor: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Raise UserError unless ``tensor`` is of ``dtype``, which a kernel reads it as; None is fine."""
    if tensor is not None and tensor.dtype != dtype:
        raise UserError(f"{operation}: {name} must be {dtype}, not {tensor.dtype}")


def last_dense(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy where neighbours of its last dim do not lie side by side; rows may lie anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
