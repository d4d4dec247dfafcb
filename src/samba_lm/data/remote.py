"""Prepared data at a URL of fsspec: shards are fetched whole into a cache of this machine, as they are read."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from samba_lm.data.cache import Cache, check_copy, wrong_size
from samba_lm.data.folder import DataFolder, LocalFolder, ShardFile
from samba_lm.errors import UserError
from samba_lm.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from samba_lm.urls import PlaceError, Url, failures, is_url

T = TypeVar("T")

META_NAME = "meta.json"

_WAITS = (1.0, 5.0, 20.0)
"""Seconds before each further try of a shard that could not be read."""
_FIRST_WAITS = (1.0,)
"""The same for small files: they are read first, so a mistake in the address shows there."""


def data_folder(folder: str | os.PathLike[str] | Url, cache: Cache | None = None) -> DataFolder:
    """Where the files of a data set are: a path of this machine, or a URL. Raises UserError for a URL of no use."""
    if isinstance(folder, Url):
        return RemoteFolder(folder, cache or Cache())
    if isinstance(folder, str) and is_url(folder):
        return RemoteFolder(Url(folder), cache or Cache())
    return LocalFolder(Path(folder))


class RemoteFolder:
    """A data set at a URL.

    Raises UserError where the URL's kind is not known, or needs a package that is not installed.
    """

    def __init__(self, url: Url, cache: Cache) -> None:
        self.path = url
        self.cache = cache
        self._files, self._root = _opened(url)
        self._queue: deque[ShardFile] = deque()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()

    def __str__(self) -> str:
        return str(self.path)

    def small(self, name: str) -> bytes | None:
        try:
            return self._again(lambda: bytes(self._files.cat_file(f"{self._root}/{name}")), name, _FIRST_WAITS)
        except (FileNotFoundError, IsADirectoryError):
            return None

    def tokenizer(self) -> Tokenizer:
        with tempfile.TemporaryDirectory(prefix="samba-lm-") as folder:
            for name in (TOKENIZER_FILE, CONFIG_FILE):
                content = self.small(name)
                if content is not None:
                    (Path(folder) / name).write_bytes(content)
                elif name == TOKENIZER_FILE:
                    raise UserError(f"{self.path / name} is missing: copy the data there again.")
            return load_tokenizer(folder)

    def check(self, files: Iterable[ShardFile]) -> None:
        """Raise UserError where the place's list of files lacks one of these, or has it in another size.

        Better now than after days, when its turn comes. Where a place gives no list (many web servers), all is well.
        """
        try:
            with failures():
                found = {
                    str(each["name"]).rstrip("/").rpartition("/")[2]: each.get("size")
                    for each in self._files.ls(self._root, detail=True)
                }
        except (PlaceError, FileNotFoundError, NotADirectoryError, NotImplementedError):
            return
        if META_NAME not in found:
            return
        for file in files:
            if file.name not in found:
                raise self._missing(file)
            size = found[file.name]
            if size not in (None, file.size):
                raise UserError(wrong_size(file, int(size), str(self.path / file.name)))

    def local(self, file: ShardFile) -> Path:
        return self.cache.file(file, lambda path: self._fetch(file, path))

    @contextlib.contextmanager
    def as_it_lies(self, file: ShardFile) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="samba-lm-") as folder:
            path = Path(folder) / file.name
            self._fetch(file, path)
            yield path

    def ahead(self, files: Iterable[ShardFile]) -> None:
        wanted = list(files)
        self.cache.hold(self, wanted)
        with self._guard:
            self._queue = deque(wanted)
            if self._thread is None:
                # A thread that ends with the process, even in the middle of a file: what it leaves is cleared away.
                self._thread = threading.Thread(target=self._work, name=f"shards of {self}", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._guard:
                if not self._queue:
                    self._thread = None
                    return
                file = self._queue.popleft()
            # Whoever reads the shard meets the error again, and tells it.
            with contextlib.suppress(UserError):
                self.local(file)

    def _fetch(self, file: ShardFile, path: Path) -> None:
        where = str(self.path / file.name)
        try:
            get = functools.partial(self._files.get_file, f"{self._root}/{file.name}", str(path))
            self._again(get, file.name, _WAITS)
        except (FileNotFoundError, IsADirectoryError):
            raise self._missing(file) from None
        check_copy(file, path, where)

    def _missing(self, file: ShardFile) -> UserError:
        return UserError(
            f"{self.path / file.name} is missing ({file.of}): copy it there again from where the data were made, or "
            "make them again with `samba-lm data prepare`."
        )

    def _again(self, task: Callable[[], T], name: str, waits: Sequence[float]) -> T:
        """``task``, tried again when the place does not answer; raises UserError when it still does not."""
        for wait in (*waits, None):
            try:
                with failures():
                    return task()
            except PlaceError as error:
                if wait is None or isinstance(error.__cause__, PermissionError):
                    raise UserError(
                        f"Cannot read {self.path / name}: {error}. Check the address, the network and your credentials."
                    ) from error
                time.sleep(wait)
        raise AssertionError


def _opened(url: Url) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    import fsspec

    try:
        with failures():
            files, root = fsspec.core.url_to_fs(url.text)
    except (PlaceError, NotImplementedError, FileNotFoundError) as error:
        missing = isinstance(error.__cause__, ImportError)
        fix = 'pip install "samba-lm[remote]"' if missing else "check the address"
        raise UserError(f"{url} cannot be opened ({error}): {fix}.") from error
    return files, str(root).rstrip("/")
