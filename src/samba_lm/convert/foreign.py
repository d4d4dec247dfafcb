"""Foreign files: reading them safely, and telling which tensor is missing, of a wrong shape, or left over."""

from __future__ import annotations

import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from samba_lm.errors import UserError
from samba_lm.files import read_json

Tensors = dict[str, torch.Tensor]

# No model comes near these; beyond them a product of sizes would not fit into 64 bits.
Layers = Annotated[int, Field(ge=1, le=10_000)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]

# What torch's reader raises for damaged bytes, depending on which ones.
DAMAGED = (
    UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Weights:
    """The tensors of a foreign checkpoint whose names start with ``prefix``; each is removed when it is taken."""

    def __init__(self, tensors: Tensors, prefix: str = "") -> None:
        self._left, self._prefix = tensors, prefix

    def under(self, prefix: str) -> Weights:
        """A view of those tensors whose names go on with ``prefix``."""
        return Weights(self._left, self._prefix + prefix)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Remove and return a tensor. Raises UserError if it is missing, of another shape, or not of real numbers."""
        tensor = self.pop(name)
        full = self._prefix + name
        if tensor is None:
            raise UserError(f"The weights have no tensor {full!r}: they belong to another config.")
        if tuple(tensor.shape) != shape:
            raise UserError(f"Tensor {full!r} has shape {list(tensor.shape)}, but the config needs {list(shape)}.")
        if not tensor.is_floating_point():
            raise UserError(f"Tensor {full!r} has dtype {tensor.dtype}: only unquantized weights can be converted.")
        return tensor

    def pop(self, name: str) -> torch.Tensor | None:
        """Remove and return a tensor, unchecked; None if there is none of that name."""
        return self._left.pop(self._prefix + name, None)

    def check_tied(self, first: torch.Tensor, second: torch.Tensor | None, name: str) -> None:
        """Raise UserError if the second copy of a tied embedding, under ``name``, differs from the first."""
        if second is not None and not torch.equal(first, second):
            raise UserError(f"The config ties the embeddings, but {name!r} differs: they belong to another config.")

    def check_empty(self, ignored: Callable[[str], bool]) -> None:
        """Raise UserError if tensors are left, other than those whose name is ``ignored``."""
        left = [name for name in self._left if not ignored(name)]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(f"The weights hold {left[0]!r}{more}, which the config has no place for.")


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """Every tensor of a .safetensors file. Raises UserError if it is missing, truncated or something else."""
    _check_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): fetch it again.") from None


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote: tensors in plain containers, and nothing that runs code (UserError otherwise)."""
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # an error follows where it matters
            return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        # What torch refuses to run, it names as GLOBAL module.name, or GLOBAL name for a builtin.
        foreign = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if foreign is None:
            raise UserError(f"{path} is truncated or no PyTorch file: fetch it again.") from None
        raise UserError(
            f"{path} holds more than tensors ({foreign[1]}) and could run code, so it was not loaded: save its state "
            "dict alone, best as .safetensors."
        ) from None


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing or holds something else."""
    path = Path(path)
    _check_file(path)
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object ({{...}}), not a {type(data).__name__}.")
    return data


def _check_file(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}: check the path.")
