"""How a conversation looks: words wrapped as they come, notes in brackets, and on a pipe nothing but the text."""

from __future__ import annotations

import contextlib
import os
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from rich.cells import cell_len

from samba_lm.errors import one_line

TAB = 8


class WordWrap:
    """Puts line breaks into a text that arrives in pieces, shown at once: a word that outgrows its line moves down.

    The last column stays empty: what terminals do there differs.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self._columns = columns
        self._width = max(1, columns() - 1)
        self._column = 0
        self._word = ""
        """What of the current word stands in this line."""

    def feed(self, text: str) -> str:
        """What to write for the next piece, control sequences included."""
        out = self._fit()
        return out + "".join(map(self._put, text))

    def _fit(self) -> str:
        """Follow a change of the terminal's width; where the line no longer fits, go on in a new one."""
        width = max(1, self._columns() - 1)
        narrower, self._width = width < self._width, width
        if narrower and self._column > width:
            self._column, self._word = 0, ""
            return "\n"
        return ""

    def _put(self, char: str) -> str:
        if char == "\n":
            self._column, self._word = 0, ""
            return char
        if char in " \t":
            self._word = ""
            cells = 1 if char == " " else TAB - self._column % TAB
            cells = max(0, min(cells, self._width - self._column))  # none at the end of a line: the break stands for it
            self._column += cells
            return " " * cells
        char = visible(char)
        cells = cell_len(char)
        if cells > 1:
            self._word = ""  # between the characters of Chinese or Japanese a line may end
        if self._column + cells <= self._width:
            self._word += char
            self._column += cells
            return char
        back = cell_len(self._word)
        if back < self._column and back + cells <= self._width:
            moved, self._word = self._word, self._word + char
            self._column = back + cells
            erase = f"\x1b[{back}D\x1b[K" if back else ""
            return f"{erase}\n{moved}{char}"
        self._word, self._column = char, cells
        return "\n" + char


def visible(text: str) -> str:
    """A text whose control characters are shown and do nothing, but for line breaks and tabs."""
    return "".join(map(_picture, text))


def _picture(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp"):
        return char
    code = ord(char)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"


class View:
    """Where the conversation is shown.

    Attributes:
        terminal: a person looks at it; else only what was said and asked for is written, as it is.
        colour: notes and errors may stand out.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self._wrap: WordWrap | None = None
        self._status = False
        self._begun = False

    def columns(self) -> int:
        """The width of the terminal now; 80 where there is none."""
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(self._out.fileno()).columns or 80
        return 80

    def note(self, text: str) -> None:
        """Tell something in brackets."""
        self._say(text, "2")

    def error(self, text: str) -> None:
        """Tell what went wrong, in one line (of the terminal, several)."""
        self._say(one_line(text), "31")

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Two columns; in a narrow terminal the second stands under the first."""
        wide = max(len(name) for name, _ in rows) + 4
        for name, text in rows:
            name, text = self._shown(name), self._shown(text)
            if not self.terminal:
                self._line(f"  {name:<{wide - 2}}{text}")
                continue
            width = self.columns() - 1
            if width >= wide + 20:
                lines = _folded(text, width - wide) or [""]
                self._line(f"  {name:<{wide - 2}}{lines[0]}")
                indent = " " * wide
            else:
                self._line(f"  {name}")
                lines, indent = ["", *_folded(text, max(8, width - 4))], " " * 4
            for line in lines[1:]:
                self._line(indent + line)

    def status(self, text: str) -> None:
        """Show for the moment what is going on, on a terminal; whatever comes next takes its place."""
        if self.terminal:
            self._status = True
            self._out.write("\r\x1b[K" + self._painted(visible(text)[: self.columns() - 1], "2"))
            self._out.flush()

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Give what shows the pieces of an answer; afterwards the line is ended."""
        self._wrap = WordWrap(self.columns) if self.terminal else None
        self._begun = False
        try:
            yield self._piece
        finally:
            self._clear()
            if self._begun or self._wrap is None:
                self._out.write("\n")
            self._out.flush()

    def _piece(self, text: str) -> None:
        if self._wrap is not None:
            if not self._begun:
                text = text.lstrip()  # the model's answers begin with a space
            self._begun = self._begun or bool(text)
            if not text:
                return
            self._clear()
            text = self._wrap.feed(text)
        self._out.write(text)
        self._out.flush()

    def _say(self, text: str, style: str) -> None:
        self._clear()
        text = f"({self._shown(text)})"
        for line in _folded(text, self.columns() - 1) if self.terminal else [text]:
            self._line(self._painted(line, style))

    def _shown(self, text: str) -> str:
        return visible(text) if self.terminal else text

    def _line(self, text: str) -> None:
        self._clear()
        self._out.write(text + "\n")
        self._out.flush()

    def _clear(self) -> None:
        if self._status:
            self._status = False
            self._out.write("\r\x1b[K")

    def _painted(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.colour else text


def _folded(text: str, width: int) -> list[str]:
    """A text's lines, none wider: broken between words, and inside what is longer than a line, such as a path."""
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, max(8, width), break_on_hyphens=False) or [""]
    return lines
