"""Where prepared data lie: a folder of this machine. (:mod:`samba_lm.data.remote` is the other kind.)"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer, load_tokenizer
from samba_lm.urls import Url

AGAIN = "make the data again with `samba-lm data prepare`, or copy it again"


@dataclass(frozen=True)
class ShardFile:
    """One of a data set's array files, as ``meta.json`` tells of it.

    Attributes:
        name: in the folder.
        size: in bytes.
        sha256: in hex.
        of: which shard it is of, in words, for errors.
    """

    name: str
    size: int
    sha256: str
    of: str


class DataFolder(Protocol):
    """Where the files of a data set are."""

    @property
    def path(self) -> Path | Url: ...

    def __str__(self) -> str:
        """Its name for people."""
        ...

    def small(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none. Raises UserError when it cannot be read."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The one that made the tokens. Raises UserError when it is missing or none."""
        ...

    def local(self, file: ShardFile) -> Path:
        """A whole copy of ``file`` on this machine. Raises UserError when it is missing or of another size."""
        ...

    def as_it_lies(self, file: ShardFile) -> contextlib.AbstractContextManager[Path]:
        """``file`` as it is at its place now, whatever copies there are. Raises UserError when it is missing."""
        ...

    def ahead(self, files: Iterable[ShardFile]) -> None:
        """These will be asked for, the first ones first."""
        ...


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def small(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"Cannot read {self.path / name}: {error.strerror}.") from error

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)

    def local(self, file: ShardFile) -> Path:
        path = self.path / file.name
        if not path.is_file():
            raise UserError(f"{path} is missing ({file.of}): {AGAIN}.")
        actual = path.stat().st_size
        if actual != file.size:
            raise UserError(
                f"{path} has {actual} bytes, not the {file.size} of meta.json (cut short or changed): {AGAIN}."
            )
        return path

    @contextlib.contextmanager
    def as_it_lies(self, file: ShardFile) -> Iterator[Path]:
        yield self.local(file)

    def ahead(self, files: Iterable[ShardFile]) -> None:
        pass


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
