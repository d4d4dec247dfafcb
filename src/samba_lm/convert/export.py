"""One folder of a model, from whatever holds it: a run, also while it goes on, a step of many processes, a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from samba_lm import checkpoint
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError, did_you_mean
from samba_lm.files import atomic_folder, recover_folder
from samba_lm.mixers.mamba import Selection
from samba_lm.model import SambaLM
from samba_lm.tensor_files import Piece, TensorFiles, write_pieces
from samba_lm.tokenizer import Tokenizer

TRIES = 5
"""How often the newest step is looked for anew when the run deleted it meanwhile."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    source: Path
    """The folder that was read."""
    config: ModelConfig
    tokenizer: Tokenizer | None
    dtype: str
    """Of most numbers; the recurrence's own have 32 bits at least."""
    size: int
    """Bytes of the weights."""
    sha256: str
    """Of their file."""


def export(source: Path, out: Path, *, step: int | None = None, dtype: torch.dtype | None = None) -> Exported:
    """Write a model's folder (config.json, model.safetensors, tokenizer.json) at ``out``, which appears when complete.

    ``source``: a run's folder (its newest step, or ``step``), a step's, or any model's. ``dtype``: None keeps what the
    model has in memory. Tensor by tensor: no more than the largest is in memory, but where adapters have to be added.
    Raises UserError when there is no such checkpoint, it is damaged, or ``out`` holds something else.
    """
    checkpoint.check_replaceable(out)
    recover_folder(source)
    for left in reversed(range(TRIES)):
        folder = _find(source, step)
        if out.resolve() == folder.resolve():
            raise UserError(f"{out} is the checkpoint itself: choose another folder.")
        try:
            config, tokenizer_hash = checkpoint.read_config(folder)
            files = checkpoint.open_weights(folder, config)
            tokenizer = checkpoint.read_tokenizer(folder, config, tokenizer_hash)
            break
        except UserError:
            # A run deletes its older checkpoints: this one was the newest when we looked.
            if left == 0 or step is not None or folder.exists():
                raise
    if dtype is None:
        dtype = checkpoint.memory_dtype(folder)
    with torch.device("meta"):
        model = SambaLM(config)
    if checkpoint.read_lora(folder) is None:
        _check(model, files, folder)
        pieces = [_piece(files, name, dtype, name in _wide(model)) for name in model.state_dict()]
    else:
        loaded, _ = checkpoint.load(folder, dtype=dtype)
        pieces = [Piece.whole(name, tensor) for name, tensor in loaded.state_dict().items()]
    with atomic_folder(out) as tmp:
        checkpoint.write_config(model, tmp, tokenizer)
        written = write_pieces(tmp / checkpoint.WEIGHTS, pieces, checkpoint.weights_metadata(config))
        (tmp / checkpoint.WEIGHTS).chmod(0o644)
    most = max(pieces, key=lambda piece: torch.Size(piece.shape).numel()).dtype
    return Exported(folder, config, tokenizer, str(most).removeprefix("torch."), written.size, written.sha256)


def _find(source: Path, step: int | None) -> Path:
    if step is not None:
        steps = {int(path.name.removeprefix("step-")): path for path in sorted(source.glob("step-*")) if _is_step(path)}
        if step not in steps:
            raise UserError(
                f"{source} has no checkpoint of step {step}."
                + (did_you_mean(str(step), [str(n) for n in steps]) if steps else " Is it a run's folder?")
            )
        return steps[step]
    folder = checkpoint.find(source)
    if folder is None:
        raise UserError(f"There is no folder {str(source)!r}: give a run's, a step's or a model's.")
    return folder


def _is_step(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix("step-").isdecimal()


def _check(model: SambaLM, files: TensorFiles, folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: files.shape(name) for name in files.names()}
    if wanted != found:
        name = next(n for n in sorted(wanted.keys() | found.keys()) if wanted.get(n) != found.get(n))
        raise UserError(
            f"{folder}: tensor {name!r} has shape {found.get(name)}, but model {model.config.name!r} needs "
            f"{wanted.get(name)}: the checkpoint is damaged, use another one."
        )


def _wide(model: SambaLM) -> set[str]:
    """The recurrence's own parameters, as :func:`samba_lm.checkpoint.place` treats them."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Selection)
        for name, _ in module.named_parameters(recurse=False)
    }


def _piece(files: TensorFiles, name: str, dtype: torch.dtype | None, wide: bool) -> Piece:
    kept = dtype is None or (wide and torch.finfo(dtype).bits < 32)
    target = files.dtype(name) if kept or dtype is None else dtype
    shape = files.shape(name)
    return Piece(name, target, shape, (0,) * len(shape), partial(_read, files, name, target))


def _read(files: TensorFiles, name: str, dtype: torch.dtype) -> Tensor:
    return files.read(name).to(dtype)
