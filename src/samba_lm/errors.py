"""The one error type that is shown to people, and helpers for its message: the nearest name, one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: the message names the value, the limit and the fix, in one line.

    The command line prints it as ``samba-lm: error: ...`` and exits with code 2, without a traceback.
    """

    topic: str | None = None
    """What it is about, where several processes say that in different words, of which the first are enough."""
    patience = 0.0
    """Seconds to wait before it is printed, where another process has the cause to tell."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest option, or a short list when nothing is near."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {near[0]!r}?"
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f" Known: {shown}."


def one_line(text: str) -> str:
    """Return ``text`` with its line breaks, and the white space around each, as single spaces."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
