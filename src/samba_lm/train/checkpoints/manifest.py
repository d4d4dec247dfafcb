"""manifest.json: every other file of a step's folder, with its size and sha256; what a checkpoint is verified by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from samba_lm import checkpoint
from samba_lm.tensor_files import DamagedError, TensorFiles, Written, sha256
from samba_lm.train.checkpoints.state import FILE as TRAINER
from samba_lm.train.parallel import Parallel
from samba_lm.validation import explain

FORMAT = "samba-lm checkpoint"
VERSION = 1
FILE = "manifest.json"
OPTIMIZER, SHARDED_OPTIMIZER = "optimizer.safetensors", "optimizer-*.safetensors"


class FileEntry(BaseModel):
    """A file as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: NonNegativeInt
    """Bytes."""
    sha256: str

    @classmethod
    def of(cls, written: Written) -> FileEntry:
        """What writing it gave."""
        return cls(size=written.size, sha256=written.sha256)


class Manifest(BaseModel):
    """What manifest.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = FORMAT
    version: int = VERSION
    files: dict[str, FileEntry]
    """By name."""


def read_manifest(folder: Path) -> Manifest | None:
    """A step folder's manifest; None where an earlier version wrote none. Raises DamagedError."""
    path = folder / FILE
    try:
        manifest = Manifest.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedError(f"{path}: {explain(error, Manifest)}") from None
    except (ValueError, RecursionError, OSError):
        raise DamagedError(f"{path} is damaged.") from None
    if any(Path(name).name != name for name in manifest.files):
        raise DamagedError(f"{path} names files that are not beside it.")
    return manifest


def check_sizes(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise DamagedError unless all files are there, as long as they were."""
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DamagedError(f"{path} is missing.")
        if size != entry.size:
            raise DamagedError(f"{path} has {size:,} bytes, not {entry.size:,}: it was cut off or changed.")


def verify(folder: Path, parallel: Parallel, *, optimizer: bool = True) -> None:
    """Raise DamagedError on all processes unless a step's folder holds what was written, every byte of it.

    ``optimizer``: its state too. The processes share the reading. A folder of an earlier version has no checksums: its
    files' headers are checked.
    """
    told, listed = None, None
    if parallel.is_main:
        try:
            manifest = read_manifest(folder)
            if manifest is None:
                _check_headers(folder, optimizer)
            else:
                files = {name: entry for name, entry in manifest.files.items() if optimizer or not _of_optimizer(name)}
                check_sizes(folder, files)
                listed = {name: entry.sha256 for name, entry in files.items()}
        except DamagedError as error:
            told = str(error)
    told, listed = parallel.broadcast((told, listed))
    if told is not None:
        raise DamagedError(told)
    if listed is None:
        return
    names = sorted(listed)
    bad = torch.zeros(len(names), dtype=torch.int64)
    for number in range(parallel.rank, len(names), parallel.world):
        try:
            bad[number] = sha256(folder / names[number]) != listed[names[number]]
        except OSError:
            bad[number] = 1
    damaged = parallel.sum(bad).nonzero().flatten().tolist()
    if damaged:
        raise DamagedError(f"{folder / names[damaged[0]]} holds other bytes than were written.")


def optimizer_files(folder: Path) -> list[Path]:
    """Where the optimizer's state lies. Raises DamagedError when it is nowhere."""
    if (folder / OPTIMIZER).is_file():
        return [folder / OPTIMIZER]
    found = sorted(folder.glob(SHARDED_OPTIMIZER))
    if not found:
        raise DamagedError(f"{folder / OPTIMIZER} is missing.")
    return found


def _of_optimizer(name: str) -> bool:
    return name == OPTIMIZER or fnmatch(name, SHARDED_OPTIMIZER)


def _check_headers(folder: Path, optimizer: bool) -> None:
    for name in (checkpoint.CONFIG, TRAINER):
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing.")
    TensorFiles(checkpoint.weight_files(folder))
    if optimizer:
        TensorFiles(optimizer_files(folder))
