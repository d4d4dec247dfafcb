"""Where contexts are kept: in memory, in a folder, or at any URL that fsspec knows, which replicas share.

A context is known by the client it belongs to and an id of ours; no path ever comes from a client. Of two files, the
context itself is written first and what lists it second, so that what is listed is whole.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from samba_lm.contexts.snapshot import Snapshot, load, save
from samba_lm.errors import UserError
from samba_lm.files import atomic_file
from samba_lm.model import SambaLM
from samba_lm.serve.models import Context
from samba_lm.serve.places import FolderPlace, Place, UrlPlace
from samba_lm.tokenizer import Tokenizer
from samba_lm.urls import PlaceError

NAME = re.compile(r"ctx-[A-Za-z0-9_-]{22}")
OWNER = re.compile(r"[0-9a-f]{32}|anyone")
LEFT = re.compile(rf"\.?{NAME.pattern}\.(ctx|json)\.tmp(-\w+)?")
"""What is written beside a file before it takes its name."""
LEFT_SECONDS = 3600.0
"""Nothing takes so long to be written."""
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

    Raises UserError for a place that cannot be written; methods raise PlaceError where it does not work any more.
    """

    def __init__(self, place: str, model: SambaLM, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        folder = place.removeprefix("file://")
        self._place: Place = UrlPlace(place) if "://" in folder else FolderPlace(Path(folder))
        try:
            self._clear()
        except PlaceError as error:
            raise UserError(f"Contexts cannot be kept in {folder}: {error}. Give another --contexts.") from error
        self._cache: OrderedDict[tuple[str, str], Snapshot] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()

    def put(self, owner: str, name: str, card: Card, snapshot: Snapshot) -> None:
        with self._place.writing(owner, f"{name}.ctx") as path:
            save(path, snapshot, self._model, self._tokenizer)
        with self._place.writing(owner, f"{name}.json") as path, atomic_file(path) as tmp:
            tmp.write_text(json.dumps(card), encoding="utf-8")
        self._remember(owner, name, snapshot)

    def card(self, owner: str, name: str) -> Card | None:
        text = self._place.text(owner, f"{name}.json")
        return None if text is None else _card(text, name)

    def get(self, owner: str, name: str) -> Snapshot | None:
        if self.card(owner, name) is None:  # another replica may have deleted it
            return None
        with self._lock:
            found = self._cache.get((owner, name))
            if found is not None:
                self._cache.move_to_end((owner, name))
                return found
        with self._place.reading(owner, f"{name}.ctx") as path:
            if path is None:
                return None
            try:
                found = load(path, self._model, self._tokenizer)
            except UserError as error:
                if not path.exists():  # deleted while we looked
                    return None
                # For a client, who need not know our paths.
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
        listed = self._place.remove(owner, f"{name}.json")
        self._place.remove(owner, f"{name}.ctx")
        return listed

    def _clear(self) -> None:
        """Remove what a process that was killed left behind: half-written files, and contexts that are not listed.

        Other replicas may be at work there, so only what is so old that nobody writes it any more.
        """
        for owner in self._place.owners():
            names = set(self._place.names(owner)) if OWNER.fullmatch(owner) else set()
            for name in names:
                unlisted = name.endswith(".ctx") and NAME.fullmatch(name[:-4]) and f"{name[:-4]}.json" not in names
                if unlisted or LEFT.fullmatch(name):
                    self._place.remove(owner, name, older_than=LEFT_SECONDS)

    def _names(self, owner: str) -> list[str]:
        names = [file.removesuffix(".json") for file in self._place.names(owner) if file.endswith(".json")]
        return [name for name in names if NAME.fullmatch(name)]

    def _remember(self, owner: str, name: str, snapshot: Snapshot) -> None:
        with self._lock:
            self._cache[owner, name] = snapshot
            held = sum(each.nbytes() for each in self._cache.values())
            while held > self._cache_bytes and self._cache:
                _, dropped = self._cache.popitem(last=False)
                held -= dropped.nbytes()


def _card(text: str, name: str) -> Card | None:
    """What was written when the context was made; None where that is something else, which somebody put there."""
    try:
        card: Card = Context.model_validate_json(text).model_dump()
    except (ValidationError, RecursionError):
        return None
    return card if card["id"] == name else None
