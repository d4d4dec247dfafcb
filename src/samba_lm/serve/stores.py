"""Where contexts are kept: in memory, in a folder, or at any URL that fsspec knows, which replicas share.

A context is known by the client it belongs to and an id of ours; no path ever comes from a client. Of two files, the
context itself is written first and what lists it second, so that what is listed is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import ValidationError

from samba_lm.contexts.snapshot import Snapshot, load, save
from samba_lm.errors import UserError
from samba_lm.files import atomic_file
from samba_lm.model import SambaLM
from samba_lm.serve.models import Context
from samba_lm.tokenizer import Tokenizer

NAME = re.compile(r"ctx-[A-Za-z0-9_-]{22}")
Card = dict[str, Any]
"""What is told of a context without reading it."""


class Store(Protocol):
    """Keeps the contexts of all clients. Its methods may wait for a disk: they are called off the event loop."""

    def put(self, owner: str, name: str, card: Card, snapshot: Snapshot) -> None: ...

    def card(self, owner: str, name: str) -> Card | None: ...

    def get(self, owner: str, name: str) -> Snapshot | None: ...

    def cards(self, owner: str) -> list[Card]: ...

    def count(self, owner: str) -> int: ...

    def delete(self, owner: str, name: str) -> bool: ...


class FullError(UserError):
    """No more contexts can be kept."""


class MemoryStore:
    """Contexts that end with the process.

    Args:
        most: bytes that all of them may hold.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[str, dict[str, tuple[Card, Snapshot]]] = {}

    def put(self, owner: str, name: str, card: Card, snapshot: Snapshot) -> None:
        held = sum(one.nbytes() for each in list(self._held.values()) for _, one in list(each.values()))
        if held + snapshot.nbytes() > self._most:
            raise FullError(
                f"The contexts hold {held >> 20:,} MiB, and one more is above this server's limit of "
                f"{self._most >> 20:,} MiB: delete some."
            )
        self._held.setdefault(owner, {})[name] = card, snapshot

    def card(self, owner: str, name: str) -> Card | None:
        found = self._held.get(owner, {}).get(name)
        return None if found is None else found[0]

    def get(self, owner: str, name: str) -> Snapshot | None:
        found = self._held.get(owner, {}).get(name)
        return None if found is None else found[1]

    def cards(self, owner: str) -> list[Card]:
        return [card for card, _ in list(self._held.get(owner, {}).values())]

    def count(self, owner: str) -> int:
        return len(self._held.get(owner, {}))

    def delete(self, owner: str, name: str) -> bool:
        return self._held.get(owner, {}).pop(name, None) is not None


class FileStore:
    """Contexts as files: ``OWNER/ID.ctx`` and, with what is listed, ``OWNER/ID.json``.

    Args:
        place: a folder, or a URL such as ``s3://bucket/contexts`` (whose fsspec package must be installed).
        cache_bytes: for states that were used last.

    Raises UserError for a place that cannot be written.
    """

    def __init__(self, place: str, model: SambaLM, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._files: _Files = _Remote(place) if "://" in place else _Folder(Path(place))
        self._cache: OrderedDict[tuple[str, str], Snapshot] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()

    def put(self, owner: str, name: str, card: Card, snapshot: Snapshot) -> None:
        with self._files.writing(owner, f"{name}.ctx") as path:
            save(path, snapshot, self._model, self._tokenizer)
        with self._files.writing(owner, f"{name}.json") as path, atomic_file(path) as tmp:
            tmp.write_text(json.dumps(card), encoding="utf-8")
        self._remember(owner, name, snapshot)

    def card(self, owner: str, name: str) -> Card | None:
        text = self._files.text(owner, f"{name}.json")
        return None if text is None else _card(text, name)

    def get(self, owner: str, name: str) -> Snapshot | None:
        if self.card(owner, name) is None:  # another replica may have deleted it
            return None
        with self._lock:
            found = self._cache.get((owner, name))
            if found is not None:
                self._cache.move_to_end((owner, name))
                return found
        with self._files.reading(owner, f"{name}.ctx") as path:
            if path is None:
                return None
            try:
                found = load(path, self._model, self._tokenizer)
            except UserError as error:  # for a client, who need not know our paths
                raise UserError(str(error).replace(str(path), f"Context {name}")) from None
        self._remember(owner, name, found)
        return found

    def cards(self, owner: str) -> list[Card]:
        return [card for name in self._names(owner) if (card := self.card(owner, name)) is not None]

    def count(self, owner: str) -> int:
        return len(self._names(owner))

    def delete(self, owner: str, name: str) -> bool:
        with self._lock:
            self._cache.pop((owner, name), None)
        listed = self._files.remove(owner, f"{name}.json")
        self._files.remove(owner, f"{name}.ctx")
        return listed

    def _names(self, owner: str) -> list[str]:
        names = [file.removesuffix(".json") for file in self._files.names(owner) if file.endswith(".json")]
        return [name for name in names if NAME.fullmatch(name)]

    def _remember(self, owner: str, name: str, snapshot: Snapshot) -> None:
        with self._lock:
            self._cache[owner, name] = snapshot
            held = sum(each.nbytes() for each in self._cache.values())
            while held > self._cache_bytes and self._cache:
                _, dropped = self._cache.popitem(last=False)
                held -= dropped.nbytes()


class _Files(Protocol):
    """Files by owner and name. Raises UserError or OSError where the place fails."""

    def writing(self, owner: str, name: str) -> contextlib.AbstractContextManager[Path]: ...

    def reading(self, owner: str, name: str) -> contextlib.AbstractContextManager[Path | None]: ...

    def text(self, owner: str, name: str) -> str | None: ...

    def names(self, owner: str) -> list[str]: ...

    def remove(self, owner: str, name: str) -> bool: ...


class _Folder:
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
        (self._root / owner).mkdir(mode=0o700, exist_ok=True)
        yield self._root / owner / name

    @contextlib.contextmanager
    def reading(self, owner: str, name: str) -> Iterator[Path | None]:
        path = self._root / owner / name
        yield path if path.exists() else None

    def text(self, owner: str, name: str) -> str | None:
        try:
            return (self._root / owner / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # not there, or not ours: a folder, a loop of links, other bytes
            return None

    def names(self, owner: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root / owner))
        except FileNotFoundError:
            return []

    def remove(self, owner: str, name: str) -> bool:
        try:
            (self._root / owner / name).unlink()
        except FileNotFoundError:
            return False
        return True


class _Remote:
    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._fs.makedirs(self._root, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            shown = urlsplit(url)._replace(netloc=urlsplit(url).hostname or "").geturl()  # no password in a log
            raise UserError(f"Contexts cannot be kept at {shown}: {error}. Give another --contexts.") from error

    def _path(self, owner: str, name: str = "") -> str:
        return "/".join(part for part in (self._root.rstrip("/"), owner, name) if part)

    @contextlib.contextmanager
    def writing(self, owner: str, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="samba-lm-") as folder:
            path = Path(folder) / name
            yield path
            self._fs.makedirs(self._path(owner), exist_ok=True)
            # A place that cannot rename (an object store) shows an object when it is whole; others rename.
            self._fs.put_file(str(path), self._path(owner, f".{name}.tmp"))
            self._fs.mv(self._path(owner, f".{name}.tmp"), self._path(owner, name))

    @contextlib.contextmanager
    def reading(self, owner: str, name: str) -> Iterator[Path | None]:
        with tempfile.TemporaryDirectory(prefix="samba-lm-") as folder:
            path = Path(folder) / name
            try:
                self._fs.get_file(self._path(owner, name), str(path))
            except FileNotFoundError:
                yield None
                return
            yield path

    def text(self, owner: str, name: str) -> str | None:
        try:
            return str(self._fs.cat_file(self._path(owner, name)), "utf-8")
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            return None

    def names(self, owner: str) -> list[str]:
        self._fs.invalidate_cache()  # other replicas write there too
        try:
            return sorted(str(path).rpartition("/")[2] for path in self._fs.ls(self._path(owner), detail=False))
        except FileNotFoundError:
            return []

    def remove(self, owner: str, name: str) -> bool:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._path(owner, name)):
            return False
        self._fs.rm_file(self._path(owner, name))
        return True


def _card(text: str, name: str) -> Card | None:
    """What was written when the context was made; None where that is something else, which somebody put there."""
    try:
        card: Card = Context.model_validate_json(text).model_dump()
    except (ValidationError, RecursionError):
        return None
    return card if card["id"] == name else None
