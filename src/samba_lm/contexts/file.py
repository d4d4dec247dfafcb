"""A context's file: safetensors whose every byte, header included, is under one checksum. Imports no torch.

The checksum stands in the header and is that of the file with the checksum's own digits as zeros: sha256 over the
sha256 of each block. It finds damage; it is no signature. The format is read and written here and not by the
safetensors package because the bytes that were checked must be the ones that are used, read once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samba_lm.contexts.identity import in_threads
from samba_lm.errors import UserError
from samba_lm.files import atomic_file

FORMAT = "samba-lm-context"
VERSION = "1"
_MARK = b'"checksum":"'
_ZEROS = "0" * 64
_BLOCK = 4 << 20
_HEADER_LIMIT = 1 << 20  # bytes; some hundred a tensor
_AGAIN = "make it again with `samba-lm context save`."


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its safetensors dtype, its shape, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Contents:
    """A file that is whole."""

    metadata: dict[str, str]
    entries: list[Entry]
    nbytes: int
    """The file's size."""
    data: npt.NDArray[np.uint8]
    """All of it, where it was asked for; entries' places count from its beginning."""


def write(
    path: str | os.PathLike[str],
    metadata: dict[str, str],
    tensors: Sequence[tuple[str, str, tuple[int, ...], npt.NDArray[np.uint8]]],
) -> None:
    """Write (name, dtype, shape, bytes) tensors atomically, to be read by the owner alone.

    Those of large elements must come first, so that each is aligned. Raises UserError when it cannot be written, or
    would replace what is no context.
    """
    path = Path(path)
    check_replaceable(path)
    header, end = {}, 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + data.nbytes]}
        end += data.nbytes
    metadata = {"format": FORMAT, "version": VERSION, "checksum": _ZEROS, **metadata}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= _HEADER_LIMIT, f"a header of {len(text)} bytes"
    with _errors(path, "written"), atomic_file(path) as tmp:
        tmp.chmod(0o600)
        with tmp.open("r+b") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, _, _, data in tensors:
                file.write(data.data)
            file.flush()
            file.seek(8 + text.index(_MARK) + len(_MARK))
            file.write(_checksum(file.fileno(), os.fstat(file.fileno()).st_size, file.tell()).encode())


def read(path: str | os.PathLike[str], with_data: bool) -> Contents:
    """Read a file and check all of it; ``with_data``: keep it. Memory is constant without.

    Raises UserError for a file that is missing, foreign, of another version, damaged or cut off.
    """
    path = Path(path)
    with _errors(path, "read"):
        if not path.is_file():
            what = "is a folder, and" if path.is_dir() else "is" if path.exists() else "does not exist: it is"
            raise UserError(f"{path} {what} no context's file: give one made by `samba-lm context save`.")
        with path.open("rb") as file:
            return _read(path, file.fileno(), with_data)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise UserError where a context may not be written: over a folder, or over what is not a context."""
    path = Path(path)
    with _errors(path, "written"):
        if path.is_dir():
            raise UserError(f"{path} is a folder: give a file in it, such as {path / 'book.ctx'}.")
        if not path.exists():
            return
        ours = path.is_file()
        if ours:
            with path.open("rb") as file:
                head = file.read(256)
            ours = not head or f'"format":"{FORMAT}"'.encode() in head
        if not ours:
            raise UserError(f"{path} exists and is no context: it would be lost, choose another name.")


def _read(path: Path, fd: int, with_data: bool) -> Contents:
    size = os.fstat(fd).st_size
    foreign = UserError(f"{path} is no context, or its beginning is damaged: {_AGAIN}")
    start = os.pread(fd, 8, 0)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(_HEADER_LIMIT, size - 8):
        raise foreign
    text = os.pread(fd, length, 8)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        known, version = metadata["format"] == FORMAT, metadata["version"]
        mark = 8 + text.index(_MARK) + len(_MARK)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise foreign from None
    if not known:
        raise foreign
    if version != VERSION:
        raise UserError(
            f"{path} has format version {version!r}, this samba-lm reads {VERSION!r}: upgrade samba-lm, or {_AGAIN}"
        )
    data = np.empty(size if with_data else 0, np.uint8)
    if _checksum(fd, size, mark, data if with_data else None) != text[mark - 8 : mark + 56].decode("latin-1"):
        raise UserError(f"{path} is damaged or cut off (its checksum differs): {_AGAIN}")
    try:
        entries = [_entry(name, entry, 8 + length, size) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds tensors that this samba-lm does not understand: {_AGAIN}") from None
    return Contents(metadata, entries, size, data)


def _entry(name: str, entry: Any, offset: int, size: int) -> Entry:
    dtype, shape = entry["dtype"], entry["shape"]
    begin, end = entry["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or not offset + begin <= offset + end <= size:
        raise ValueError(name)
    return Entry(name, str(dtype), tuple(shape), offset + begin, offset + end)


def _checksum(fd: int, size: int, mark: int, into: npt.NDArray[np.uint8] | None = None) -> str:
    """The checksum of a file whose checksum's digits begin at ``mark``; what is read is kept in ``into``."""

    def digest(begin: int) -> bytes:
        end = min(begin + _BLOCK, size)
        block: memoryview | bytes
        if into is not None:
            block = into[begin:end].data
            block = block[: os.preadv(fd, [block], begin)]
        else:
            block = os.pread(fd, end - begin, begin)
        if begin < mark + 64 and mark < end:
            block = b"".join((block[: mark - begin], _ZEROS.encode(), block[mark + 64 - begin :]))
        return hashlib.sha256(block).digest()

    assert mark + 64 <= _BLOCK, "the header is in the first block"

    return hashlib.sha256(b"".join(in_threads(digest, range(0, size, _BLOCK)))).hexdigest()


@contextlib.contextmanager
def _errors(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be {done}: {(error.strerror or 'unknown error').lower()}. "
            "Give another path, or see to its permissions and to the room on the disk."
        ) from error
