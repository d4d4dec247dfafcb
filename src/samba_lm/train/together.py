"""Errors of one process that all must know of: none goes on to wait for one that has stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from samba_lm.errors import UserError
from samba_lm.train.parallel import Parallel


class ElsewhereError(UserError):
    """Another process of the run stopped; that one tells why."""

    patience = 5.0  # by then torchrun has ended this process, and one message is enough


@contextmanager
def together(parallel: Parallel) -> Iterator[None]:
    """Work that speaks with no other process; where it fails on one, none goes past the end of the block.

    The one that failed raises its error, the others ElsewhereError. A process that dies without a word is torchrun's
    business, and without it that of the process group's timeout.
    """
    try:
        yield
    except Exception:
        parallel.agree(True)
        raise
    if parallel.agree(False):
        raise ElsewhereError("Another process of this run stopped; its own message tells why.")
