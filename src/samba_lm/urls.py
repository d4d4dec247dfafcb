"""URLs of fsspec (s3://, gs://, hf://, https://): told from paths, shown without passwords, failures as one kind."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from samba_lm.errors import UserError, one_line

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


class PlaceError(Exception):
    """A place for files does not answer, or refuses: a disk, a network, a permission."""


@dataclass(frozen=True)
class Url:
    """An address. As a string it has no password, ``text`` is what to open."""

    text: str

    def __str__(self) -> str:
        return shown(self.text)

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rstrip("/").rpartition("/")[2]


def is_url(text: str) -> bool:
    """Whether this is a URL, not a path."""
    return _URL.match(text) is not None


def shown(url: str) -> str:
    """A URL without its user and password, for messages and logs."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Whatever goes wrong becomes a PlaceError: fsspec's packages raise errors of all kinds.

    But for what says that something is not there or not done, which callers tell apart.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, NotImplementedError, UserError):
        raise
    except Exception as error:
        told = re.sub(r"""[^\s/"']+@""", "...@", one_line(str(error)))  # a URL's user and password
        raise PlaceError(told or type(error).__name__) from error
