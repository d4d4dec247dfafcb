"""Tensors in safetensors files: whole, or cut into pieces that lie in several files (one for each process of a run).

A file of pieces tells in its header where each begins, under the keys that torch.distributed.checkpoint uses
(``HuggingFaceStorageReader`` reads such a folder). Writing goes tensor by tensor, so neither a file nor its checksum
needs a second copy in memory, and the same tensors always give the same bytes (safetensors' own writer orders several
keys of its metadata at random).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from samba_lm.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the types that we write."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARDING = "DCP_SHARDING_INFO"
"""The header's key of the pieces' offsets: ``{name: {"saved_offsets": [row, ...]}}`` as JSON."""
BLOCK = 1 << 24
"""Bytes written, or read, and hashed at once."""


class DamagedError(UserError):
    """A file is missing, cut off, or holds other bytes than were written."""


class StoppedError(Exception):
    """The writing was asked to stop."""


@dataclass(frozen=True)
class Piece:
    """A tensor to be written, or a part of one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the piece."""
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor, in each dimension."""
    get: Callable[[], Tensor]
    """Gives its values when their turn comes, on any device."""

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Piece:
        """A tensor that is written as one."""
        return cls(name, tensor.dtype, tuple(tensor.shape), (0,) * tensor.ndim, lambda: tensor)


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    size: int
    """Bytes."""
    sha256: str


def write_pieces(
    path: Path,
    pieces: Iterable[Piece],
    metadata: Mapping[str, str] | None = None,
    *,
    sharded: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Written:
    """Write a new safetensors file to the disk (fsync included) and return its size and checksum.

    ``sharded``: the header tells each piece's offsets. ``stopped`` is asked between blocks; StoppedError follows.
    Raises OSError when the disk is full or ``path`` may not be written or exists.
    """
    # As safetensors does: the widest types first keeps each tensor aligned to its own width.
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name))
    header = _header(ordered, dict(metadata or {}), sharded)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:

        def put(data: memoryview | bytes) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        put(header)
        for piece in ordered:
            data = _bytes(piece)
            for start in range(0, len(data), BLOCK):
                if stopped():
                    raise StoppedError
                put(data[start : start + BLOCK])
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _header(pieces: Sequence[Piece], metadata: dict[str, str], sharded: bool) -> bytes:
    if sharded:
        offsets = {piece.name: {"saved_offsets": list(piece.offsets)} for piece in pieces}
        metadata |= {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for piece in pieces:
        begin, end = end, end + math.prod(piece.shape) * piece.dtype.itemsize
        assert piece.name not in entries, f"two tensors are called {piece.name}"
        entries[piece.name] = {
            "dtype": NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(piece: Piece) -> memoryview:
    tensor = piece.get().detach().to("cpu").contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, piece.shape), piece.name
    # numpy knows no bfloat16, and a tensor of no dimension has no other view.
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def sha256(path: Path, *, from_disk: bool = False, stopped: Callable[[], bool] = lambda: False) -> str:
    """A file's checksum. ``from_disk``: of what the disk has, not what the system remembers, where that can be asked.

    Raises OSError, and StoppedError when ``stopped`` says so.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if from_disk and sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(BLOCK)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            if stopped():
                raise StoppedError
            digest.update(view[:count])
    return digest.hexdigest()


@dataclass(frozen=True)
class _Place:
    """Where a piece lies."""

    file: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


class TensorFiles:
    """The tensors of one or more files, each whole or in pieces; the files stay readable when they are deleted."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files. Raises DamagedError when one is missing or cut off, or pieces of a tensor are missing."""
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._files: list[Any] = []
        self._places: dict[str, list[_Place]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for number, path in enumerate(self.paths):
            try:
                file = safe_open(path, framework="pt")
                self._files.append(file)
                self._read_header(number, file)
            except FileNotFoundError:
                if path.exists():  # what may not be read is not found either
                    raise UserError(f"{path} may not be read: see to its permissions.") from None
                raise DamagedError(f"{path} is missing.") from None
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{path} is truncated or damaged ({error}).") from None
        for name, places in self._places.items():
            if sum(math.prod(place.shape) for place in places) != math.prod(self.shape(name)):
                raise DamagedError(f"{self.paths[0].parent} lacks a part of the tensor {name}.")

    def _read_header(self, number: int, file: Any) -> None:
        metadata = file.metadata() or {}
        offsets = json.loads(metadata.get(SHARDING, "null"))
        self.metadata |= metadata
        for name in file.keys():  # noqa: SIM118 - not a dict
            piece = file.get_slice(name)
            shape = tuple(piece.get_shape())
            begin = (0,) * len(shape) if offsets is None else tuple(int(n) for n in offsets[name]["saved_offsets"])
            if len(begin) != len(shape) or min(begin, default=0) < 0:
                raise ValueError(f"wrong offsets of {name}")
            dtype = DTYPES[piece.get_dtype()]
            if self._dtypes.setdefault(name, dtype) != dtype:
                raise ValueError(f"{name} is of two types")
            self._places.setdefault(name, []).append(_Place(number, shape, begin))

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ends = [[o + s for o, s in zip(p.offsets, p.shape, strict=True)] for p in self._places[name]]
        return tuple(max(dimension) for dimension in zip(*ends, strict=True))

    def dtype(self, name: str) -> torch.dtype:
        """Of its elements."""
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU; one that lies in one piece is mapped, not copied."""
        places = self._places[name]
        if len(places) == 1:
            tensor: Tensor = self._files[places[0].file].get_tensor(name)
            return tensor
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, whole, (0,) * whole.ndim)
        return whole

    def read_into(self, name: str, target: Tensor, offsets: Sequence[int]) -> None:
        """Fill ``target`` (any device, any floating dtype) with the part of the tensor that begins at ``offsets``."""
        for place in self._places[name]:
            begins = [max(o, p) for o, p in zip(offsets, place.offsets, strict=True)]
            ends = [
                min(o + n, p + m) for o, n, p, m in zip(offsets, target.shape, place.offsets, place.shape, strict=True)
            ]
            if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
                continue
            mine = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, offsets, strict=True))
            there = tuple(slice(b - p, e - p) for b, e, p in zip(begins, ends, place.offsets, strict=True))
            file = self._files[place.file]
            if mine:
                target[mine].copy_(file.get_slice(name)[there])
            else:  # no dimension, nothing to cut
                target.copy_(file.get_tensor(name))
