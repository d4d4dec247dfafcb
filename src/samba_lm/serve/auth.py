"""Who may ask: keys from a file, and what each may do."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from samba_lm.errors import UserError, did_you_mean
from samba_lm.serve.errors import ApiError, busy

KEY = re.compile(r"[\x21-\x7e]{16,512}")
NUMBER = re.compile("[1-9][0-9]{0,8}")
LIMITS = ("requests_per_minute", "concurrent")


@dataclass
class Client:
    """One key's owner: what is allowed, and what is going on."""

    name: str
    owner: str
    """What its contexts are filed under: a hash of the key, or "anyone" where there are no keys."""
    requests_per_minute: int | None = None
    concurrent: int | None = None
    """HTTP requests at once."""
    running: int = 0
    _credit: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._credit = float(self.requests_per_minute or 0)

    def enter(self) -> None:
        """Begin a request. Raises ApiError (429) above a limit; else :meth:`leave` must follow."""
        if self.concurrent is not None and self.running >= self.concurrent:
            raise busy(f"This key may have {self.concurrent} requests at once: wait until one has ended.")
        if self.requests_per_minute is not None:
            now = time.monotonic()
            rate = self.requests_per_minute / 60
            self._credit = min(self.requests_per_minute, self._credit + rate * (now - self._since))
            self._since = now
            if self._credit < 1:
                seconds = int((1 - self._credit) / rate) + 1
                raise busy(f"This key may make {self.requests_per_minute} requests a minute.", seconds)
            self._credit -= 1
        self.running += 1

    def leave(self) -> None:
        self.running -= 1


class Keys:
    """The keys of a server; without any, everybody who reaches it may ask."""

    def __init__(self, clients: dict[bytes, Client] | None = None) -> None:
        self._clients = clients or {}
        self._anyone = None if clients else Client("anyone", "anyone")

    @property
    def needed(self) -> bool:
        return self._anyone is None

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Keys from a file: one a line, limits after it (``requests_per_minute=60 concurrent=4 name=alice``); a
        word that begins with ``#`` begins a comment. Raises UserError for what is no such file."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8: write one API key a line.") from None
        clients: dict[bytes, Client] = {}
        for number, line in enumerate(lines, 1):
            comment = re.search(r"(^|\s)#", line)
            words = line[: comment.start() if comment else None].split()
            if words:
                # The key itself is not repeated: errors end up in logs.
                digest, client = _client(words, f"{path}, line {number}")
                if digest in clients:
                    raise UserError(f"{path}, line {number}: the same key stands above.")
                clients[digest] = client
        if not clients:
            raise UserError(f"{path} holds no API key: write one a line, at least 16 characters long.")
        return cls(clients)

    def check(self, authorization: str | None) -> Client:
        """Who sends this ``Authorization`` header. Raises ApiError (401)."""
        if self._anyone is not None:
            return self._anyone
        kind, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        found = None
        for known, client in self._clients.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = client
        if found is None or kind.lower() != "bearer":
            said = "This server needs an API key: send Authorization: Bearer KEY." if not key else "Wrong API key."
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _client(words: list[str], where: str) -> tuple[bytes, Client]:
    key, *options = words
    if not KEY.fullmatch(key):
        raise UserError(f"{where}: an API key is 16 to 512 printable ASCII characters without spaces.")
    digest = _digest(key)
    owner = digest.hex()[:32]
    name, limits = owner[:8], dict[str, int]()
    for option in options:
        field_name, _, value = option.partition("=")
        if field_name == "name" and value:
            name = value
        elif field_name not in LIMITS:
            raise UserError(f"{where}: {field_name[:60]!r} is no limit.{did_you_mean(field_name, [*LIMITS, 'name'])}")
        elif not NUMBER.fullmatch(value):
            raise UserError(f"{where}: {option[:60]!r} must be a whole number from 1 to 999999999.")
        else:
            limits[field_name] = int(value)
    return digest, Client(name, owner, **limits)
