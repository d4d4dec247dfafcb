"""Going on from a step's folder: which one, and its tensors into a model and an optimizer of any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from samba_lm import checkpoint
from samba_lm.model import SambaLM
from samba_lm.tensor_files import DamagedError, TensorFiles
from samba_lm.train.checkpoints.manifest import optimizer_files
from samba_lm.train.checkpoints.snapshot import local_part
from samba_lm.train.optim import load_optimizer_tensors, optimizer_tensors
from samba_lm.train.parallel import Parallel
from samba_lm.train.together import together


def restore_model(folder: Path, model: SambaLM, parallel: Parallel) -> None:
    """Fill the model's tensors, placed and perhaps sharded as for training, from a step's folder.

    Each process reads what it holds. Raises UserError on all processes when the files are damaged or of another model.
    """
    tensors = model.state_dict()
    with together(parallel):
        _fill(tensors, checkpoint.open_weights(folder, model.config), folder, parallel)


def restore_optimizer(folder: Path, model: SambaLM, optimizer: torch.optim.Optimizer, parallel: Parallel) -> None:
    """Fill the state of a new ``optimizer`` from a step's folder.

    Raises UserError on all processes when the files are missing, damaged or of another optimizer.
    """
    tensors = optimizer_tensors(model, optimizer)
    with together(parallel):
        _fill(tensors, TensorFiles(optimizer_files(folder)), folder, parallel)
    try:
        load_optimizer_tensors(model, optimizer, tensors)
    except ValueError as error:
        raise DamagedError(f"{optimizer_files(folder)[0]} is damaged ({error}).") from None


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], files: TensorFiles, folder: Path, parallel: Parallel) -> None:
    if tensors.keys() != files.names():
        name = min(tensors.keys() ^ files.names())
        raise DamagedError(
            f"{folder} has no tensor {name}." if name in tensors else f"{folder} holds {name}, which does not fit."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != files.shape(name):
            raise DamagedError(f"{folder}: {name} has shape {list(files.shape(name))}, not {list(tensor.shape)}.")
        local, offsets = local_part(tensor.detach(), parallel)
        files.read_into(name, local, offsets)
