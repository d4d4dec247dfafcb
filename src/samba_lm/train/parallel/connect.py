"""Joining a run: from what torchrun says, and a recipe, to :class:`Parallel`."""

from __future__ import annotations

import os

import torch

from samba_lm.errors import UserError
from samba_lm.train.parallel.parallel import Parallel
from samba_lm.train.recipe import ParallelSection


def connect(device: str = "auto", section: ParallelSection | None = None) -> Parallel:
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
