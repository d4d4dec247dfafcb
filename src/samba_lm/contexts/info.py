"""What a context's file says of itself, for those who list contexts: no model is needed, and no torch."""

from __future__ import annotations

import datetime
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from samba_lm.contexts import file
from samba_lm.contexts.identity import Identity
from samba_lm.contexts.token_hash import BLOCK, TokenHash
from samba_lm.errors import UserError

MAX_TITLE = 200
_DIGITS = 20
"""Numbers are written at one width, so that a file's size does not tell how much was read."""


@dataclass(frozen=True)
class Info:
    """A context without its tensors."""

    title: str
    created: str
    """ISO 8601, UTC."""
    read: TokenHash
    made_by: Identity
    device: str
    """The kind of device it was made on: going on is exact to the bit on the same kind."""
    nbytes: int = 0
    """The file's size."""

    @property
    def tokens(self) -> int:
        return self.read.tokens

    def to_metadata(self) -> dict[str, str]:
        """As it stands in the file."""
        return {
            **{f"made_by_{name}": value for name, value in asdict(self.made_by).items()},
            "device": self.device,
            "tokens": f"{self.read.tokens:0{_DIGITS}}",
            "token_hash": self.read.hexdigest(),
            "token_chain": self.read.chain.hex(),
            "token_tail": self.read.tail.hex().ljust(16 * BLOCK),
            "created": self.created,
            "title": self.title,
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], nbytes: int) -> Info:
        """Raises KeyError, TypeError or ValueError for what :meth:`to_metadata` did not write."""
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata are texts")
        made_by = Identity(**{field.name: metadata[f"made_by_{field.name}"] for field in fields(Identity)})
        chain, tail = bytes.fromhex(metadata["token_chain"]), bytes.fromhex(metadata["token_tail"])
        read = TokenHash(chain, tail, int(metadata["tokens"]))
        if read.hexdigest() != metadata["token_hash"] or len(tail) != 8 * (read.tokens % BLOCK):
            raise ValueError("the hash of the tokens")
        title, created = metadata["title"], metadata["created"]
        return cls(check_title(title), created, read, made_by, metadata["device"], nbytes)


def inspect(path: str | os.PathLike[str]) -> Info:
    """Check a file and tell what it holds. Raises UserError as :func:`samba_lm.contexts.snapshot.load` does."""
    return info_of(path, file.read(path, with_data=False))


def info_of(path: str | os.PathLike[str], contents: file.Contents) -> Info:
    """What a file that is whole says of itself. Raises UserError when it is not what we write."""
    try:
        return Info.from_metadata(contents.metadata, contents.nbytes)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} was not written by this version of samba-lm: make it again with `samba-lm context save`."
        ) from None


def check_title(title: str) -> str:
    """The title. Raises UserError unless it is one line of at most 200 characters."""
    if len(title) > MAX_TITLE or not title.isprintable():
        shown = ascii(title if len(title) <= 50 else title[:50] + "...")
        raise UserError(f"The title {shown} is no line of at most {MAX_TITLE} characters: give a shorter, plain one.")
    return title


def title_of(path: str | os.PathLike[str]) -> str:
    """A title for what is read from a file: its name, made printable and short."""
    name = Path(path).name[:MAX_TITLE]
    return "".join(char if char.isprintable() else "?" for char in name)


def now() -> str:
    """The time as contexts write it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
