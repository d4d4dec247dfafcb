"""Writing without ever leaving half a file: write beside, fsync, rename, fsync the parent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samba_lm.errors import UserError

# In the names of what an interrupted write may leave behind; readers ignore it.
TMP_MARK = ".tmp-"


def fsync_path(path: Path) -> None:
    """Force a file's or a folder's contents to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def existing(folder: Path) -> Path:
    """``folder``, or the nearest above it that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


def check_replaceable(path: Path, called: str) -> None:
    """Raise UserError where ``path``, ``called`` so in the message, is a device or a pipe: a file may not take its
    place."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{called} is a device or a pipe, which a file would take the place of: give another path.")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, and a place that may not be written, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full: could not write {path}. What was there before is untouched; "
                "free some space and run the same command again."
            ) from error
        if isinstance(error, PermissionError):
            raise UserError(f"No permission to write {path}: choose a folder you own.") from error
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on any error it is removed.

    Of a link, what it leads to is replaced. Raises UserError when the disk is full, the folder may not be written, or
    ``path`` is a device or a pipe.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    check_replaceable(path, str(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=path.name + TMP_MARK, dir=path.parent)
        os.close(fd)
        os.chmod(name, 0o644)
        tmp = Path(name)
        try:
            yield tmp
            fsync_path(tmp)
            os.replace(tmp, path)
            fsync_path(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes its place, on any error it is removed.

    An existing folder at ``path`` stays complete until the new one is wholly on the disk. Two renames swap them; a
    crash between the two leaves the old one as ``path`` + ``.tmp-old``, which :func:`recover_folder` puts back.
    """
    path = _named(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        tmp = Path(tempfile.mkdtemp(prefix=path.name + TMP_MARK, dir=path.parent))
        os.chmod(tmp, 0o755)
        try:
            yield tmp
            for root, _, names in os.walk(tmp):
                for name in names:
                    fsync_path(Path(root) / name)
                fsync_path(Path(root))
            old = _old(path)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)  # of a crash after the second rename: ``path`` is whole
                os.replace(path, old)
            os.replace(tmp, path)
            fsync_path(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Put back a folder whose replacement was cut off between the two renames of :func:`atomic_folder`."""
    path = Path(os.path.realpath(path))
    if not path.name:  # the root was never one of ours
        return
    old = _old(path)
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def _named(path: str | os.PathLike[str]) -> Path:
    """The path without links, so that a link stays one and what it points to is replaced."""
    if not os.fspath(path):
        raise UserError("An empty path names no folder: give one.")
    real = Path(os.path.realpath(path))
    if not real.name:
        raise UserError(f"{path} cannot be replaced: name a folder in it.")
    return real


def _old(path: Path) -> Path:
    return path.with_name(path.name + TMP_MARK + "old")


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Hold the file ``path`` while the context lasts, and remove it then.

    The lock is the system's and not the file: what a killed process leaves behind holds nobody up. Where a file system
    has no locks, nothing is held. Raises UserError, saying ``busy``, where another process holds it.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _held(path)
        while fd is None:
            fd = _held(path)
    try:
        if fd < 0:
            raise UserError(busy)
        yield
    finally:
        if fd >= 0:
            path.unlink(missing_ok=True)
            os.close(fd)


def _held(path: Path) -> int | None:
    """The descriptor of a file that this process has locked now, -1 where another process has, None where the file was
    removed between the two steps."""
    import fcntl  # which Windows does not have

    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except BlockingIOError:
        os.close(fd)
        return -1
    except FileNotFoundError:
        pass
    except OSError:  # no locks here
        return fd
    os.close(fd)
    return None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises UserError when it is missing, not UTF-8, not JSON, or nested too deeply."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a JSON file.") from None
    except RecursionError:
        raise UserError(f"{path} is not valid: it is nested too deeply.") from None
    except ValueError as error:  # not UTF-8, not JSON, a number too long
        raise UserError(f"{path} is not valid JSON ({error}): it is damaged, use another one.") from None
