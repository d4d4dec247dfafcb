"""Files by owner and name, in a folder or at a URL of fsspec. Readers never meet one that is half-written."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from samba_lm.errors import UserError
from samba_lm.urls import PlaceError, failures, shown

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "obs", "oci"}
"""fsspec's protocols where an object is seen when it is whole, and where nothing can be renamed."""


class Place(Protocol):
    """Raises PlaceError where it fails; a file that is not there is no failure."""

    def writing(self, owner: str, name: str) -> contextlib.AbstractContextManager[Path]:
        """A path to write the file to by :func:`samba_lm.files.atomic_file`; then it is seen under its name."""
        ...

    def reading(self, owner: str, name: str) -> contextlib.AbstractContextManager[Path | None]:
        """A path to read the file from; None where there is none."""
        ...

    def text(self, owner: str, name: str) -> str | None:
        """A short file; None where there is none, or no text."""
        ...

    def owners(self) -> list[str]: ...

    def names(self, owner: str) -> list[str]: ...

    def remove(self, owner: str, name: str, older_than: float = 0.0) -> bool:
        """Whether it was there, unchanged for so many seconds, and is gone."""
        ...


class FolderPlace:
    """Raises UserError for a folder that cannot be written."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise UserError(f"Contexts cannot be kept in {root}: {error.strerror}. Give another --contexts.") from error

    @contextlib.contextmanager
    def writing(self, owner: str, name: str) -> Iterator[Path]:
        with failures():
            (self._root / owner).mkdir(mode=0o700, exist_ok=True)
        yield self._root / owner / name

    @contextlib.contextmanager
    def reading(self, owner: str, name: str) -> Iterator[Path | None]:
        path = self._root / owner / name
        with failures():
            there = path.exists()
        yield path if there else None

    def text(self, owner: str, name: str) -> str | None:
        try:
            return (self._root / owner / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # not there, or not ours: a folder, a loop of links, other bytes
            return None

    def owners(self) -> list[str]:
        with failures():
            return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir())

    def names(self, owner: str) -> list[str]:
        try:
            with failures():
                return sorted(os.listdir(self._root / owner))
        except FileNotFoundError:
            return []

    def remove(self, owner: str, name: str, older_than: float = 0.0) -> bool:
        path = self._root / owner / name
        try:
            with failures():
                if older_than and time.time() - path.stat().st_mtime < older_than:
                    return False
                path.unlink()
        except (FileNotFoundError, IsADirectoryError):
            return False
        return True


class UrlPlace:
    """Raises UserError for a URL that cannot be written."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            with failures():
                self._fs, root = fsspec.core.url_to_fs(url)
                self._root = str(root).rstrip("/")
                protocols = self._fs.protocol
                self._whole = not OBJECT_STORES.isdisjoint((protocols,) if isinstance(protocols, str) else protocols)
                if not self._whole:  # in an object store this would make a bucket
                    self._fs.makedirs(self._root, exist_ok=True)
                probe = f"{self._root}/.samba-lm-{secrets.token_hex(8)}"
                self._fs.pipe_file(probe, b"")
                self._fs.rm_file(probe)
        except (PlaceError, FileNotFoundError) as error:
            raise UserError(f"Contexts cannot be kept at {shown(url)}: {error}. Give another --contexts.") from error

    def _path(self, owner: str, name: str = "") -> str:
        return "/".join(part for part in (self._root, owner, name) if part)

    @contextlib.contextmanager
    def writing(self, owner: str, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="samba-lm-") as folder:
            path = Path(folder) / name
            yield path
            with failures():
                if self._whole:
                    self._fs.put_file(str(path), self._path(owner, name))
                    return
                self._fs.makedirs(self._path(owner), exist_ok=True)
                self._fs.put_file(str(path), self._path(owner, f".{name}.tmp"))
                self._fs.mv(self._path(owner, f".{name}.tmp"), self._path(owner, name))

    @contextlib.contextmanager
    def reading(self, owner: str, name: str) -> Iterator[Path | None]:
        with tempfile.TemporaryDirectory(prefix="samba-lm-") as folder:
            path = Path(folder) / name
            try:
                with failures():
                    self._fs.get_file(self._path(owner, name), str(path))
            except FileNotFoundError:
                yield None
                return
            yield path

    def text(self, owner: str, name: str) -> str | None:
        try:
            with failures():
                return str(self._fs.cat_file(self._path(owner, name)), "utf-8")
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            return None

    def owners(self) -> list[str]:
        return self._list(self._root)

    def names(self, owner: str) -> list[str]:
        return self._list(self._path(owner))

    def _list(self, folder: str) -> list[str]:
        try:
            with failures():
                self._fs.invalidate_cache()  # other replicas write there too
                found = self._fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def remove(self, owner: str, name: str, older_than: float = 0.0) -> bool:
        path = self._path(owner, name)
        try:
            with failures():
                self._fs.invalidate_cache()
                if not self._fs.exists(path):
                    return False
                if older_than:
                    changed = self._fs.modified(path)
                    now = datetime.datetime.now(changed.tzinfo or datetime.UTC).replace(tzinfo=changed.tzinfo)
                    if (now - changed).total_seconds() < older_than:
                        return False
                self._fs.rm_file(path)
        except (FileNotFoundError, IsADirectoryError, NotImplementedError):  # the last: a place that knows no times
            return False
        return True
