"""Rows of an evaluation's data: JSON lines, packed or not, with the fields that a task reads."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_lm.data.sources import opened
from samba_lm.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Record:
    """One row: its number from 0, where it stands in words, and its JSON object."""

    row: int
    where: str
    fields: dict[str, Any]

    def get(self, name: str, kind: type[str] | type[list[Any]]) -> Any:
        """A field's value. Raises UserError where it is missing or of another kind."""
        if name not in self.fields:
            raise UserError(f"{self.where} has no field {name!r}.{did_you_mean(name, self.fields)}")
        value = self.fields[name]
        if not isinstance(value, kind):
            shown = json.dumps(value, ensure_ascii=False)[:40]
            raise UserError(f"{self.where}: field {name!r} is {shown}, not a {'text' if kind is str else 'list'}.")
        return value

    def text(self, name: str) -> str:
        """A field that is a text, or a UserError."""
        found: str = self.get(name, str)
        return found

    def inner(self, name: str) -> list[Record]:
        """A field that is a list of objects, as records, or a UserError."""
        found = []
        for i, value in enumerate(self.get(name, list)):
            where = f"{self.where}, {name} {i + 1}"
            if not isinstance(value, dict):
                raise UserError(f"{where} is not a JSON object.")
            found.append(Record(i, where, value))
        return found


@dataclass(frozen=True)
class Records:
    """A file's rows, and the sha256 of its unpacked bytes."""

    rows: tuple[Record, ...]
    sha256: str


def read_records(path: Path) -> Records:
    """Read JSON lines, one object a line, also packed (.gz, .xz, .bz2, .zst).

    Raises UserError, naming the line, where there is no such file or it holds something else.
    """
    digest = hashlib.sha256()
    rows: list[Record] = []
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give a .jsonl file in it.")
    try:
        path.stat()
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: give the path of a .jsonl file.") from None
    except OSError:
        pass  # opening it tells why
    with opened(path) as (_, lines):
        for number, line in enumerate(lines, start=1):
            digest.update(line)
            if line.strip():
                rows.append(_record(line, f"{path} line {number}", len(rows)))
    if not rows:
        raise UserError(f"{path} has no rows: give another file.")
    return Records(tuple(rows), digest.hexdigest())


def _record(line: bytes, where: str, row: int) -> Record:
    try:
        value = json.loads(line)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply: remove the line.") from None
    except ValueError as error:  # not UTF-8, not JSON, a number too long
        raise UserError(f"{where} is not valid JSON ({error}): each line must be one object.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object: each line must be one.")
    return Record(row, where, value)
