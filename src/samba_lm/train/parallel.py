"""Where a run computes, and with whom. The only file that knows about other processes and shards a model."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samba_lm.errors import UserError


@dataclass(frozen=True)
class Parallel:
    """The processes of a run; the loop calls these and stays single-device code. This one is a single process."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """Place the model, whose layers are already checkpointed and compiled, on this run's device(s), in place."""
        return model.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        return tensor


def connect(device: str = "auto") -> Parallel:
    """Join the run: one process on ``device`` ("auto": a CUDA GPU if there is one, else the CPU)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UserError(f"WORLD_SIZE is {world}: this version trains in one process; start it without torchrun.")
    return Parallel(device=pick_device(device))


def pick_device(device: str) -> torch.device:
    """Resolve "auto", "cpu", "cuda", "cuda:1". Raises UserError when there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise UserError(f"Unknown device {device!r}: use auto, cpu, cuda or cuda:N.") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device {device!r} asked for, but {torch.cuda.device_count()} CUDA GPUs found: use auto or cpu."
        )
    if picked.type not in ("cpu", "cuda"):
        raise UserError(f"Device {device!r} is not supported for training: use auto, cpu or cuda.")
    return picked
