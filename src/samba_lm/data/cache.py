"""Copies of files from elsewhere, in a folder of this machine that never grows beyond a limit.

A file is known by its sha256 and checked against it before it is seen under its name, so that every process of a
machine, and every run, may share one folder: of several that need a file one fetches it, and the others wait. When
room is needed, the file goes that was asked for the longest time ago; none that this process is reading.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

from samba_lm.data.folder import ShardFile, file_sha256
from samba_lm.errors import UserError
from samba_lm.files import TMP_MARK, atomic_file

DEFAULT_GB = 100.0
_SUFFIX = ".npy"


class Cache:
    """Files by their sha256.

    Args:
        folder: made where it is missing; None: ``samba-lm/shards`` in the user's folder for caches.
        limit: bytes that the files may take.
    """

    def __init__(self, folder: Path | None = None, limit: int = int(DEFAULT_GB * 1e9)) -> None:
        self.folder = folder or default_folder()
        self.limit = limit
        self._held: dict[Hashable, frozenset[str]] = {}
        self._guard = threading.Lock()

    def hold(self, owner: Hashable, files: Iterable[ShardFile]) -> None:
        """Keep these files, and no longer those that ``owner`` named before."""
        with self._guard:
            self._held[owner] = frozenset(file.sha256 for file in files)

    def file(self, file: ShardFile, fetch: Callable[[Path], None]) -> Path:
        """The copy of ``file``, which ``fetch`` writes to a path if there is none yet.

        Raises UserError when the file has no room or cannot be written, and whatever ``fetch`` raises.
        """
        path = self.folder / f"{file.sha256}{_SUFFIX}"
        if self._used(path, file.size):
            return path
        with self._alone(file.sha256[:2]):
            if self._used(path, file.size):  # another process was faster
                return path
            for left in self.folder.glob(f"{file.sha256[:2]}*{TMP_MARK}*"):  # of a killed process: only we write here
                left.unlink(missing_ok=True)
            self._make_room(file)
            with atomic_file(path) as partial:
                fetch(partial)
        return path

    def _used(self, path: Path, size: int) -> bool:
        """Whether the file is there, whole; then it was asked for now."""
        try:
            if path.stat().st_size != size:
                return False
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError:  # another user's file: it is whole, and its age theirs
            return True
        return True

    def _make_room(self, file: ShardFile) -> None:
        with self._guard:
            held = frozenset().union(*self._held.values())
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in found) + file.size
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            if path.suffix == _SUFFIX and path.stem not in held:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                    total -= size
        if total > self.limit:
            raise UserError(
                f"{file.name} ({file.of}, {gigabytes(file.size)}) has no room beside what is being read in the cache "
                f"{self.folder}, which is limited to {gigabytes(self.limit)}: raise data.cache_gb, or set a smaller "
                "data.shuffle_shards."
            )

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold one of 256 locks: threads of this process, and other processes, wait."""
        import fcntl  # which Windows does not have

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"The cache {self.folder} cannot be written ({error.strerror}): set data.cache to another folder."
            ) from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks: then each fetches for itself
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def check_copy(file: ShardFile, copy: Path, where: str) -> None:
    """Raise UserError unless ``copy`` holds what the data set's description says of ``file``."""
    size = copy.stat().st_size
    if size != file.size:
        raise UserError(wrong_size(file, size, where))
    actual = file_sha256(copy)
    if actual != file.sha256:
        raise UserError(
            f"{where} ({file.of}) was changed: its sha256 is {actual[:12]}..., not {file.sha256[:12]}...; copy it "
            "there again."
        )


def wrong_size(file: ShardFile, size: int, where: str) -> str:
    """What is wrong with a file of so many bytes."""
    return f"{where} ({file.of}) has {size} bytes, not the {file.size} of meta.json: copy it there again, whole."


def default_folder() -> Path:
    """Where programs of this user keep what they can fetch again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samba-lm" / "shards"


def gigabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
