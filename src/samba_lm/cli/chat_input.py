"""What a person types: messages of one line or several, edited, completed, and remembered for the next time.

The standard library's readline does the editing. It knows pasted blocks, line breaks inside a line (Alt-Enter) and
changes of the terminal's width, so a package for it (prompt_toolkit: two more for everyone who installs samba-lm) would
add colours while typing and little else. Where Python comes without it, lines are typed plainly.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from samba_lm.errors import UserError
from samba_lm.files import atomic_file

Complete = Callable[[str], list[str]]
"""The lines that a line's beginning may become."""

FENCE = "```"
CONTINUED = "... "
REMEMBERED = 1000
"""Entries that a new chat starts with; the file is cut down to them when it holds twice as many."""
LONGEST_REMEMBERED = 10_000
"""Characters: a pasted book is said, not remembered."""
_BACKSLASHES = re.compile(r"(?<!\\)(?:\\\\)*\\$")


@dataclass(frozen=True)
class Entry:
    """What was typed."""

    text: str
    plain: bool
    """It stood between fences or after a space: a message, whatever it looks like."""


def history_path() -> Path | None:
    """Where this user's lines are remembered; None where the user has no home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    with contextlib.suppress(RuntimeError):
        folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
        return folder / "samba-lm" / "chat-history.jsonl"
    return None


class History:
    """Lines typed in earlier chats: a file with a JSON string a line, for its owner alone (mode 0600).

    Each chat adds to its end, so that two at once lose nothing of each other. Nothing raises for a file that cannot be
    read or written: :attr:`trouble` then says why the lines are forgotten at the end.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.trouble: str | None = None
        self.entries: list[str] = []
        if path is None:
            return
        try:
            self._read(path)
        except FileNotFoundError:
            pass
        except (OSError, UserError) as error:
            self._give_up(error)

    def add(self, text: str) -> bool:
        """Remember a line; False for one that is not worth it: the last one again, or one after a space."""
        again = bool(self.entries) and self.entries[-1] == text
        if again or not _worth(text):
            return False
        self.entries.append(text)
        if self._path is not None:
            try:
                self._append(self._path, text)
            except OSError as error:
                self._give_up(error)
        return True

    def _read(self, path: Path) -> None:
        if not path.is_file():
            if path.exists():
                raise UserError(f"{path} is no file")
            return
        lines = path.read_bytes().splitlines()
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):  # a damaged line is a forgotten one
                text = json.loads(line)
                if isinstance(text, str) and _worth(text):
                    self.entries.append(text)
        self.entries = self.entries[-REMEMBERED:]
        if len(lines) > 2 * REMEMBERED:
            with atomic_file(path) as tmp:
                tmp.chmod(0o600)
                tmp.write_text("".join(json.dumps(text) + "\n" for text in self.entries), encoding="ascii")

    def _append(self, path: Path, text: str) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with open(fd, "r+b", buffering=0) as file:
            if stat.S_IMODE(os.fstat(fd).st_mode) != 0o600:
                os.chmod(path, 0o600)
            size = os.fstat(fd).st_size
            # After a line that was cut off, by a full disk say, a new one begins.
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            file.write(b"\n" * torn + json.dumps(text).encode("ascii") + b"\n")

    def _give_up(self, error: OSError | UserError) -> None:
        reason = (error.strerror or "unknown error").lower() if isinstance(error, OSError) else str(error)
        self.trouble = f"what you type is not remembered: {self._path}: {reason}"
        self._path = None


def _worth(text: str) -> bool:
    if not text or text[0].isspace() or len(text) > LONGEST_REMEMBERED or "\0" in text:
        return False
    try:
        text.encode("utf-8", "surrogateescape")  # as readline takes it
    except UnicodeEncodeError:
        return False
    return True


class Prompt:
    """Reads messages from the standard input: a terminal with all comforts, or a pipe."""

    def __init__(self, stdin: TextIO, history: History, complete: Complete, colour: bool) -> None:
        if isinstance(stdin, io.TextIOWrapper):
            stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is told when it is said
        self.interactive = stdin.isatty()
        self._stdin = stdin
        self._history = history
        self._bold = False
        self._readline = _readline() if self.interactive and sys.stdout.isatty() else None
        if self._readline is not None:
            self._bold = colour and not _libedit(self._readline)
            _set_up(self._readline, history, complete)

    def read(self, prompt: str) -> Entry:
        """The next message or command. Raises EOFError at the end, KeyboardInterrupt for Ctrl-C."""
        text = self._line(prompt)
        lines = text.split("\n")
        fence = lines[0].strip()
        if fence == FENCE or (fence.startswith(FENCE) and fence[len(FENCE) :].isalnum()):
            while (len(lines) == 1 or lines[-1].strip() != FENCE) and (more := self._more()):
                lines += more
            self._remember("\n".join(lines))
            if fence == FENCE:  # a fence that names a language belongs to what is said
                lines = lines[1:-1] if lines[-1].strip() == FENCE and len(lines) > 1 else lines[1:]
            return Entry("\n".join(lines), plain=True)
        while _BACKSLASHES.search(lines[-1]) and (more := self._more()):
            lines[-1] = lines[-1][:-1]
            lines += more
        text = "\n".join(lines)
        self._remember(text.rstrip())
        return Entry(text.strip(), plain=text[:1].isspace())

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Show what is typed meanwhile only at the next prompt: it would stand in the middle of an answer."""
        termios = _termios() if self.interactive else None
        if termios is None:
            yield
            return
        fd = self._stdin.fileno()
        before: list[Any] = termios.tcgetattr(fd)
        quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
        termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)

    def _more(self) -> list[str]:
        """The lines that follow; none at the end of the input, which ends what was begun."""
        try:
            return self._line(CONTINUED).split("\n")
        except EOFError:
            if self.interactive:
                print()
            return []

    def _line(self, prompt: str) -> str:
        if not self.interactive:
            return input()
        if self._readline is None and not sys.stdout.isatty():  # the answers go to a file: no prompts among them
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        return input(f"\x01\x1b[1m\x02{prompt}\x01\x1b[0m\x02" if self._bold else prompt)

    def _remember(self, text: str) -> None:
        if self.interactive and self._history.add(text) and self._readline is not None:
            self._readline.add_history(text)


def _set_up(readline: ModuleType, history: History, complete: Complete) -> None:
    readline.set_auto_history(False)
    for text in history.entries:
        readline.add_history(text)

    found: list[str] = []

    def candidate(word: str, index: int) -> str | None:
        if index == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            # Only what stands after the last space is replaced.
            found[:] = [each[len(line) - len(word) :] for each in complete(line)]
        return found[index] if index < len(found) else None

    readline.set_completer(candidate)
    readline.set_completer_delims(" ")
    if _libedit(readline):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter: a line break in the line
        readline.parse_and_bind("set enable-bracketed-paste on")


def _libedit(readline: ModuleType) -> bool:
    return "libedit" in (readline.__doc__ or "")


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows, or a Python built without it
        return None
    return readline


def _termios() -> ModuleType | None:
    try:
        import termios
    except ImportError:
        return None
    return termios
