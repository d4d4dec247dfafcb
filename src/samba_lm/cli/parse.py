"""Command-line parsing: a dataclass or pydantic model is the command line, and a mistake in it is one line.

tyro builds the options (names, types, defaults, help from the docstrings under the fields). It tells mistakes in panels
of many lines; here they become one :class:`~samba_lm.errors.UserError`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import tyro
from pydantic import ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from samba_lm.errors import UserError, did_you_mean, one_line
from samba_lm.validation import explain

T = TypeVar("T")


def several(metavar: str, read: Callable[[list[str]], tuple[T, ...]], show: Callable[[T], str] = str) -> Any:
    """For ``Annotated[tuple[T, ...], several(...)]``: an option whose one word holds several values, commas between."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(show, value))],
    )


# A row of captured --help: two spaces, a short name perhaps, and the long names.
_OPTIONS_ROW = re.compile(r"(?:^| ) (?:-\w, )?(--[a-zA-Z][\w.-]*(?:, --[a-zA-Z][\w.-]*)*)", re.MULTILINE)

_COLOUR = re.compile(r"\x1b\[[\d;]*m")

# What tyro and Python's converters say, and how we say it.
_WORDS = (
    (r"^Missing value for argument '(.+?)'\. Expected 1 values\.", r"\1 needs a value."),
    (r"^Missing value for argument '(.+?)'\. Expected (\d+) values\.", r"\1 needs \2 values."),
    (r"^Error parsing (.+?): invalid literal for int\(\) with base 10: (.+)$", r"\1 = \2: expected a whole number."),
    (r"^Error parsing (.+?): could not convert string to float: (.+)$", r"\1 = \2: expected a number."),
    (
        r"^Error parsing (.+?): Exceeds the limit .* value has (\d+) digits;.*$",
        r"\1: a number of \2 digits is too large.",
    ),
    (
        r"^Error parsing (.+?): no type matching (.+) could be instantiated from \[(.+?)\]\..*$",
        r"\1 = \3: expected \2.",
    ),
    (
        r"^Error parsing (.+?): Could not find valid parse for arguments: \[(.+)\]$",
        r"\1 = \2: not the right kind or number of values.",
    ),
    (r"^Error parsing (.+?): (.+)$", r"\1: \2"),
)


def parse(
    cls: type[T], argv: Sequence[str], *, prog: str, description: str | None = None, default: T | None = None
) -> T:
    """Parse ``argv`` into an instance of ``cls``, a dataclass or pydantic model.

    Args:
        cls: its fields are the options; the docstring under each is the help text.
        argv: the words after the command's name.
        prog: the command's full name, such as ``"samba-lm data show"``.
        description: the first lines of ``--help``; by default the docstring of ``cls``.
        default: an instance whose values stand where ``argv`` says nothing, such as a recipe read from a file.

    Raises:
        UserError: any bad input, in one line that ends with where to read more.
        SystemExit: with code 0, after ``--help`` was printed.
    """

    def run() -> T:
        fallback = tyro.MISSING_NONPROP if default is None else default
        return tyro.cli(cls, args=argv, prog=prog, description=description, default=fallback)

    try:
        with _captured() as panel:
            return run()
    except SystemExit as stop:
        if stop.code != 2:
            with _without_colour() if os.environ.get("NO_COLOR") else contextlib.nullcontext(), _folded():
                run()  # --help: once more, for this terminal's width
            raise
        raise _mistake(_from_exception(stop, panel) or _from_panel(panel, argv, cls, prog, default), prog) from stop
    except ValidationError as error:
        raise _mistake(explain(error), prog) from error
    except UserError as error:
        raise _mistake(str(error), prog) from error


def _mistake(message: str, prog: str) -> UserError:
    message = one_line(message)
    return UserError(f"{message}{'' if message.endswith(('.', '?', '!')) else '.'} See `{prog} --help`.")


def _from_exception(stop: SystemExit, panel: io.StringIO) -> str | None:
    """What our own validators said, if it was one of them that made tyro stop."""
    error = stop.__context__
    while error is not None:
        if isinstance(error, ValidationError):
            # tyro names the section being built, or the whole class, which is no part of a path.
            named = re.search(r"Error parsing -*([^:\s]+):", panel.getvalue())
            return explain(error, prefix=named.group(1) if named and named.group(1) != error.title else "")
        if isinstance(error, UserError):
            return str(error)
        error = error.__context__
    return None


def _from_panel(panel: io.StringIO, argv: Sequence[str], cls: type[T], prog: str, default: T | None) -> str:
    """Say in one line what a tyro error panel says: a title, a rule, the message, a rule, advice."""
    rows = [row.removeprefix("  ").rstrip() for row in panel.getvalue().splitlines()[2:]]
    body = list(itertools.takewhile(lambda row: row.strip("-"), rows))
    text = " ".join(row.strip() for row in body)
    if text.startswith("Could not create CLI parser"):
        raise TypeError(f"{cls.__name__} cannot be a command line: {' '.join(map(str.strip, rows))}")
    if text.startswith("Missing from "):
        # Options stand indented by four under the heading, their help by eight.
        missing = [row.strip() for row in body[1:] if not row.startswith(" " * 8)]
        return f"Missing {', '.join(missing)}."
    if text.startswith("Unrecognized options: "):
        return _unrecognized(text.removeprefix("Unrecognized options: "), argv, cls, prog, default)
    choice = re.match(r"invalid choice (.+) for argument '(.+?)'\. Expected one of \((.+?),?\)\.$", text)
    if choice:
        value, option, expected = choice.groups()
        near = did_you_mean(value.strip("'"), re.findall(r"'(.*?)'", expected))
        return f"{option} = {value}: expected one of {expected}." + (near if "mean" in near else "")
    text = text.removeprefix(f"Error parsing {cls.__name__}: ")
    for pattern, words in _WORDS:
        text, hits = re.subn(pattern, words, text)
        if hits:
            break
    return text


def _unrecognized(said: str, argv: Sequence[str], cls: type[T], prog: str, default: T | None) -> str:
    # tyro joins the words it did not understand with commas, and writes hyphens for underscores.
    given = [word for word in argv if said.startswith((word, word.replace("_", "-"), word.partition("=")[0]))]
    word = max(given, key=len, default=said)
    if not word.startswith("-"):
        return f"Unexpected argument {word!r}."
    option = word.partition("=")[0]
    return f"Unknown option {option!r}.{did_you_mean(option, _options(cls, prog, default))}"


def _options(cls: type[T], prog: str, default: T | None) -> list[str]:
    """Every option name, also of what only the default has, read off the help text: the one place where tyro tells
    them publicly."""
    with _captured() as text, contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"], prog=prog, default=tyro.MISSING_NONPROP if default is None else default)
    return [name for names in _OPTIONS_ROW.findall(text.getvalue()) for name in names.split(", ")]


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Catch what tyro prints, in its plain form: without colours, frames or line breaks inside long values.

    tyro chooses that form by the encoding of stdout, and the width by COLUMNS.
    """
    text = io.StringIO()
    with _environment("COLUMNS", "10000"), contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


class _Screen(io.StringIO):
    """Gathers what is for another stream, and is of the same kind."""

    def __init__(self, real: TextIO) -> None:
        super().__init__()
        self._real = real

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._real.encoding or "utf-8"

    def isatty(self) -> bool:
        return self._real.isatty()


@contextlib.contextmanager
def _folded() -> Iterator[None]:
    """Fold what stands before the options to the terminal's width, as tyro folds the options themselves."""
    screen, width = _Screen(sys.stdout), max(30, shutil.get_terminal_size().columns)
    try:
        with contextlib.redirect_stdout(screen):
            yield
    finally:
        for line in screen.getvalue().splitlines():
            plain = _COLOUR.sub("", line)
            sys.stdout.write((textwrap.fill(plain, width) if len(plain) > width else line) + "\n")


def _without_colour() -> contextlib.AbstractContextManager[None]:
    """tyro does not read NO_COLOR, only the kind of terminal."""
    return _environment("TERM", "dumb")


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
