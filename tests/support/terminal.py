"""A program in a real pseudo-terminal, and what a person would see on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from types import TracebackType
from typing import IO

from rich.cells import cell_len

# The terminal becomes the program's own, so that Ctrl-C in it is a signal to the program.
_START = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from samba_lm.cli.main import main; sys.exit(main(sys.argv[1:]))"
)
_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[=>]")


class Terminal:
    """``samba-lm`` with these arguments in a terminal of so many columns."""

    def __init__(self, *argv: object, columns: int = 80, stdout: IO[bytes] | None = None, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns)
        self.seen = ""
        """Everything that was written so far."""
        self._from = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, argv)],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "INPUTRC": "/dev/null", **environment},
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def resize(self, columns: int) -> None:
        """Change the window's width, which the kernel tells the program."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """Wait until the pattern is written after what was waited for last; return all between the two."""
        end = time.monotonic() + seconds
        while True:
            match = re.compile(pattern, re.DOTALL).search(self.seen, self._from)
            if match:
                between = self.seen[self._from : match.end()]
                self._from = match.end()
                return between
            assert self._read(end - time.monotonic()), f"{pattern!r} never came: {self.seen[-2000:]!r}"

    def say(self, keys: str, pattern: str = r"\x1b\[\?2004h[^\n]*> (?:\x1b\[0m)?$") -> str:
        """Type a line, and wait for the next prompt."""
        self.type(keys + "\r")
        return self.wait(pattern)

    def interrupt(self, pattern: str) -> str:
        """Press Ctrl-C at a prompt as people do, some time after the last key, and wait for what comes of it.

        Within some milliseconds of a key Python's readline may miss it (seen about once in 2,000 times): mostly until
        the next Ctrl-C, so it is pressed again, and the two count as one.
        """
        for _ in range(4):
            time.sleep(0.3)
            self.type("\x03")
            try:
                return self.wait(pattern, 10)
            except AssertionError:
                continue
        return self.wait(pattern, 10)

    def end(self, seconds: float = 30) -> int:
        """The exit code, once the program has ended by itself."""
        until = time.monotonic() + seconds
        while self._read(until - time.monotonic()):
            pass
        return self.process.wait(max(0.1, until - time.monotonic()))

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, seconds))
        if not ready:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the program has closed its side
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)


def screen(text: str, columns: int) -> list[str]:
    """The lines that a terminal shows of what was written to it; what would run over the edge goes on in a new line.

    Knows what the chat writes: line breaks, moves to the left, erasing to the end of the line, colours.
    """
    lines: list[list[str]] = [[]]
    column = 0
    while text:
        sequence = _SEQUENCE.match(text)
        if sequence:
            text = text[sequence.end() :]
            number = int(sequence[1]) if (sequence[1] or "").isdigit() else 1
            if sequence[2] == "D":
                column = max(0, column - number)
            elif sequence[2] == "K":
                del lines[-1][column:]
            else:
                assert sequence[2] in ("m", "h", "l", "C", None), f"the screen does not know {sequence[0]!r}"
            continue
        char, text = text[0], text[1:]
        if char == "\n":
            lines.append([])
            column = 0
        elif char == "\r":
            column = 0
        else:
            assert char.isprintable(), f"{char!r} reached the terminal"
            cells = cell_len(char)
            if column + cells > columns:
                lines.append([])
                column = 0
            if cells == 0 and column:
                lines[-1][column - 1] += char
                continue
            lines[-1][column : column + cells] = [char, *[""] * (cells - 1)]
            column += cells
    return ["".join(line) for line in lines]
