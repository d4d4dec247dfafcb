"""Bad command lines of every kind are one line; good ones give the object; --help stays tyro's."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from pydantic import BaseModel, ConfigDict, Field, model_validator

from samba_lm.cli.parse import parse
from samba_lm.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int = 10
    """Steps of warm-up, less than --train.steps."""
    steps: int = 100
    """Steps in all."""

    @model_validator(mode="after")
    def _check(self) -> Section:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: at most steps - 1 = {self.steps - 1}.")
        return self


class Recipe(BaseModel):
    """A recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: Section = Section()
    """How to train."""


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Folder of the checkpoint."""
    out: Path
    """Where to write."""
    protocol: Literal["plain", "sliding"] = "plain"
    """How to measure."""
    lengths: tuple[int, ...] = (512, 1024)
    """Context lengths, in tokens."""
    pair: tuple[int, int] = (1, 2)
    """Two numbers."""
    limit: int | None = None
    """At most so many tokens."""
    verbose: bool = False
    """Say more."""

    def __post_init__(self) -> None:
        if self.limit == 0:
            raise ValueError("--limit = 0: at least 1")
        if self.limit == 13:
            raise UserError("--limit = 13: not here.")


def _options(*argv: str) -> Options:
    return parse(Options, argv, prog="samba-lm x")


def _recipe(*argv: str) -> Recipe:
    return parse(Recipe, argv, prog="samba-lm train")


def test_good_options() -> None:
    given = _options("ckpt", "--out", "o", "--lengths", "1", "2", "3", "--limit", "7", "--verbose")
    assert given == Options("ckpt", Path("o"), lengths=(1, 2, 3), limit=7, verbose=True)


def test_a_default_stands_where_nothing_is_said() -> None:
    base = Recipe(train=Section(lr=0.5, steps=50))
    given = parse(Recipe, ["--train.warmup-steps", "5"], prog="samba-lm train", default=base)
    assert given.train == Section(lr=0.5, steps=50, warmup_steps=5)
    assert _recipe("--train.warmup_steps", "5").train.warmup_steps == 5


LONG = "/a/very/long/path" * 20

BAD_OPTIONS = [
    (["--out", "o"], ("Missing CKPT.",)),
    ([], ("Missing CKPT, --out PATH.",)),
    (["c", "--out"], ("--out needs a value.",)),
    (["c", "--out", "o", "--pair", "1"], ("--pair needs 2 values.",)),
    (["c", "--out", "o", "extra"], ("Unexpected argument 'extra'.",)),
    (["c", "--out", "o", LONG], (f"Unexpected argument '{LONG}'.",)),
    (["c", "--out", "o", "--verbos"], ("Unknown option '--verbos'.", "Did you mean '--verbose'?")),
    (["c", "--out", "o", "--lenghts=3"], ("Unknown option '--lenghts'.", "Did you mean '--lengths'?")),
    (["c", "--out", "o", "--zzzz"], ("Unknown option '--zzzz'.", "--lengths", "--protocol")),
    (["c", "--out", "o", "-z"], ("Unknown option '-z'.",)),
    (["c", "--out", "o", "--protocol", "slidin"], ("--protocol = 'slidin'", "'plain'", "Did you mean 'sliding'?")),
    (["c", "--out", "o", "--lengths", "1", "two"], ("--lengths", "'two'")),
    (["c", "--out", "o", "--limit", "many"], ("--limit = 'many'", "INT")),
    (["c", "--out", "o", "--limit", "0"], ("--limit = 0: at least 1.",)),
    (["c", "--out", "o", "--limit", "13"], ("--limit = 13: not here.",)),
    (["c", "--out", "o", "--verbose", "3"], ("Unexpected argument '3'.",)),
]
BAD_RECIPES = [
    (["--train.lr", "abc"], ("--train.lr = 'abc': expected a number.",)),
    (["--train.steps", "1.5"], ("--train.steps = '1.5': expected a whole number.",)),
    (["--train.lr", "-1"], ("train.lr = -1.0: input should be greater than 0.",)),
    (["--trian.lr", "1"], ("Unknown option '--trian.lr'.", "Did you mean '--train.lr'?")),
    (["--train.warmup_step", "1"], ("Unknown option '--train.warmup_step'.", "Did you mean '--train.warmup-steps'?")),
    (["--train.steps", "5"], ("train: warmup_steps = 10: at most steps - 1 = 4.",)),
]


@pytest.mark.parametrize(("argv", "parts"), BAD_OPTIONS)
def test_a_bad_option_is_one_line(argv: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    _expect_one_line(Options, argv, parts, "samba-lm x", capsys)


@pytest.mark.parametrize(("argv", "parts"), BAD_RECIPES)
def test_a_bad_recipe_override_is_one_line(
    argv: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    _expect_one_line(Recipe, argv, parts, "samba-lm train", capsys)


def _expect_one_line(
    cls: type, argv: list[str], parts: tuple[str, ...], prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        parse(cls, argv, prog=prog)
    message = str(caught.value)
    assert message.endswith(f" See `{prog} --help`.")
    assert "\n" not in message
    assert ".." not in message
    assert not set("\u2500\u2502\u256d\x1b") & set(message)
    for part in parts:
        assert part in message
    told = capsys.readouterr()
    assert told.out + told.err == ""


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_the_line_does_not_depend_on_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError, match=r"^Unexpected argument '(/a/very/long/path){20}'\. See"):
        _options("c", "--out", "o", LONG)


def test_a_class_that_cannot_be_parsed_is_our_defect() -> None:
    @dataclass
    class Broken:
        model: object

    with pytest.raises(TypeError, match="Broken cannot be a command line"):
        parse(Broken, [], prog="samba-lm x")


def test_help_says_names_defaults_and_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _recipe("--help")
    assert caught.value.code in (0, None)
    out = capsys.readouterr().out
    for part in ("usage: samba-lm train", "--train.lr FLOAT", "Peak learning rate.", "(default: 0.001)"):
        assert part in out
    assert out.count("usage:") == 1


SCRIPT = '''
from dataclasses import dataclass
from samba_lm.cli.parse import parse

@dataclass
class Options:
    """What stands before the options is a longer text too, and is folded between its words, never within one."""

    a: int = 1
    """A sentence that is a good deal longer than any narrow terminal would show in one single line."""

parse(Options, ["--help"], prog="samba-lm x")
'''


def _help_on_a_terminal(script: Path, **environment: str) -> str:
    """What ``--help`` writes to a real pseudo-terminal."""
    reader, writer = pty.openpty()
    environment = {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", "PATH": "", **environment}
    with os.fdopen(reader, "rb", buffering=0) as terminal:
        subprocess.run([sys.executable, script], stdout=writer, env=environment, check=True)
        os.close(writer)
        told = b""
        # Linux answers EIO when the other side is closed, macOS an end of file.
        with contextlib.suppress(OSError):
            while chunk := terminal.read(65536):
                told += chunk
    return told.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 72])
def test_help_fits_the_terminal_without_colour(columns: int, tmp_path: Path) -> None:
    script = tmp_path / "options.py"
    script.write_text(SCRIPT)
    told = _help_on_a_terminal(script, COLUMNS=str(columns), NO_COLOR="1")
    assert "\x1b" not in told
    assert "sentence" in told
    assert max(map(len, told.splitlines())) <= columns
    coloured = _help_on_a_terminal(script, COLUMNS=str(columns))
    assert "\x1b" in coloured, "then NO_COLOR would prove nothing"
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in coloured.splitlines()) <= columns
