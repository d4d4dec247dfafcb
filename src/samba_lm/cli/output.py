"""The ``--json`` files: what a command measured, and everything needed to measure it again."""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from samba_lm import __version__
from samba_lm.errors import UserError
from samba_lm.figures import FORMATS
from samba_lm.files import check_replaceable, existing, write_text


def json_file(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a Path. Raises UserError where no file can be written: nothing, a folder, too long a name, or
    a place where nothing may be made."""
    return output_file(path, "--json", "figures.json")


def output_file(path: str | os.PathLike[str], option: str, example: str) -> Path:
    """:func:`json_file` for another ``option``, with the ``example`` of a file's name that its messages give."""
    text, path = os.fspath(path), Path(path)
    if not text:
        raise UserError(f"{option} is empty: give the file to write.")
    if path.is_dir() or path.name == "..":  # raises OSError for a name that is too long
        raise UserError(f"{option} {text} is a folder: give a file in it, such as {example}.")
    check_replaceable(path, f"{option} {text}")
    there = existing(path.absolute().parent)
    if not there.is_dir():
        raise UserError(f"{option} {text}: {there} is a file and no folder: give another path.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {text}: nothing may be written in {there}: give another path.")
    return path


def figure_file(path: Path, example: str) -> Path:
    """:func:`output_file` for ``--figure``, whose ending says what is drawn."""
    output_file(path, "--figure", example)
    if path.suffix.lower() not in FORMATS:
        *others, last = FORMATS
        raise UserError(f"--figure {path}: its name must end in {', '.join(others)} or {last}.")
    return path


def check_different(files: Mapping[str, Path | None]) -> None:
    """Raise UserError where two options, ``{"--json": path}``, name one file: the second would be written over the
    first."""
    seen: dict[str, str] = {}
    for option, path in files.items():
        if path is not None and seen.setdefault(os.path.realpath(path), option) != option:
            raise UserError(
                f"{seen[os.path.realpath(path)]} and {option} are both {path}: give each a file of its own."
            )


JsonFile = Annotated[
    Path | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda words: json_file(words[0]),
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]
"""The option ``--json FILE`` of a command: a mistake in it is told before the work and not after it."""


def write_json(path: str | os.PathLike[str], record: Mapping[str, object]) -> None:
    """Write ``record`` atomically as JSON, preceded by :func:`provenance`; NaN and infinities become null.

    A key of ``record`` replaces the same key of the provenance; what device the work was done on is for it to tell.
    Values are numbers, strings, booleans, None, paths, and lists and dicts of these; anything else is a TypeError.
    Raises UserError as :func:`json_file` does.
    """
    path = json_file(path)
    text = json.dumps(_plain({**provenance(), **record}), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def provenance() -> dict[str, object]:
    """Return the command, versions, machine, threads and time (UTC, ISO 8601) of this process."""
    import torch

    facts: dict[str, object] = {
        "command": ["samba-lm", *sys.argv[1:]],
        "samba_lm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": _system(),
        "threads": torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    commit = source_commit()
    if commit is not None:
        facts["commit"] = commit
    return facts


def _system() -> str:
    """The operating system, its version and the processor's kind; of the kernel's name no more than its number."""
    number = re.match(r"[\d.]*", platform.release())
    return " ".join(filter(None, (platform.system(), number and number[0], platform.machine(), *platform.libc_ver())))


@functools.cache
def source_commit() -> str | None:
    """Return the git commit this package runs from (``-dirty`` when edited), or None when it was installed.

    Asked once a process, which goes on with the code that it has read.
    """
    source = Path(__file__).resolve().parents[2]
    if source.name != "src" or not (source.parent / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that belongs to someone else
        return None
    return told.stdout.strip()


def _plain(value: object) -> object:
    """A copy that JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
