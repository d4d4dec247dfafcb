"""A task's part of the page: files of the same settings are one group, with its figure and its table."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from samba_lm.report.found import ResultFile
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.models import Model
from samba_lm.report.page import command, facts, how

T = TypeVar("T")
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What comes of reading a file that holds something else than it should."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """What the files of a group say of one model: its figures as the task's ``read`` gave them, and its facts."""

    model: Model
    figures: T
    facts: dict[str, Any]


@dataclass(frozen=True)
class Group(Generic[T]):
    """Files of one task with the same settings; each model once. ``anchor``: an id that the page has once."""

    anchor: str
    settings: dict[str, Any]
    files: Sequence[ResultFile]
    entries: Sequence[Entry[T]]

    @property
    def record(self) -> dict[str, Any]:
        """What the first file holds beside its models."""
        return self.files[0].record

    @property
    def styles(self) -> dict[str, int]:
        return {entry.model.label: entry.model.style for entry in self.entries}

    @property
    def names(self) -> list[tuple[str, int]]:
        return list(self.styles.items())


@dataclass(frozen=True)
class Task(Generic[T]):
    """How results of ``samba-lm eval NAME`` are read and shown.

    Attributes:
        name: of the task.
        title: of its part of the page.
        about: a sentence or two on what is measured.
        read: a model's entry of a file as figures. One of :data:`DAMAGED`: that is no such entry.
        heading: what tells a group from the task's others.
        render: a group's figures and tables.
        items: what a model's entry calls the list of what was measured one by one, such as "cells"; "" for none.
        told_by: the fields that tell one of them from the others.
    """

    name: str
    title: str
    about: str
    read: Callable[[dict[str, Any]], T]
    heading: Callable[[Group[T]], str]
    render: Callable[[Group[T]], Html]
    items: str = ""
    told_by: tuple[str, ...] = ()

    def merge(self, earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
        """Of a model that two files measured with the same settings, the entries as one: every item of either, of both
        the later's, but for what was measured before and skipped later. Without items the later's."""
        if not self.items:
            return later
        held: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in (*earlier[self.items], *later[self.items]):
            key = tuple(str(row[field]) for field in self.told_by)
            if key not in held or not row.get("skipped") or held[key].get("skipped"):
                held[key] = row
        return {**later, self.items: list(held.values())}


def provenance(files: Sequence[ResultFile], settings: dict[str, Any]) -> Html:
    """How a table was made: for each file the command, the settings, where and when and by which versions."""
    lines: list[object] = []
    shown = [(key, _plain(value)) for key, value in settings.items() if value not in (None, "") and key != "task"]
    if shown:
        lines.append(join(["Settings: ", facts(shown)]))
    data = files[0].record.get("data")
    if data:
        told = data.items() if isinstance(data, dict) else [("file", data)]
        lines.append(join(["Data: ", facts([(key, _plain(value)) for key, value in told])]))
    for file in files:
        lines += _made_by(file.path, file.record)
    return how(lines)


def _made_by(path: str, record: dict[str, Any]) -> list[object]:
    lines: list[object] = []
    line = command(record.get("command"))
    if line is not None:
        lines.append(line)
    lines.append(facts(environment(path, record, record["models"])))
    return lines


def environment(path: str, record: dict[str, Any], entries: Sequence[dict[str, Any]] = ()) -> list[tuple[str, object]]:
    """Device, dtype, versions and time, as far as the record in the file ``path`` tells them."""
    found: list[tuple[str, object]] = [("file", path)] if path else []
    for name in ("device", "dtype"):
        values = dict.fromkeys(str(entry[name]) for entry in entries if entry.get(name)) or (
            dict.fromkeys([str(record[name])]) if record.get(name) else {}
        )
        if values:
            found.append((name, ", ".join(values)))
    for name, shown in (
        ("gpu", "GPU"), ("threads", "threads"), ("samba_lm", "samba-lm"), ("torch", "torch"), ("python", "Python"),
        ("platform", "on"),
    ):  # fmt: skip
        if record.get(name):
            found.append((shown, record[name]))
    if record.get("commit"):
        commit = str(record["commit"])
        found.append(("commit", commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")))
    if record.get("time"):
        found.append(("time", when(record["time"])))
    return found


def when(time: object) -> str:
    """2026-11-22T07:33:25+00:00 as "2026-11-22 07:33 UTC"; anything else as it is."""
    try:
        there = datetime.datetime.fromisoformat(str(time))
    except ValueError:
        return str(time)
    return there.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC") if there.tzinfo else str(time)


def whole(value: Any, least: int = 0) -> int:
    """A count or a length of a file. Raises ValueError for what can be none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r} is no whole number")
    if not least <= value < 1 << 53:
        raise ValueError(f"{value!r} is out of reach")
    return int(value)


def real(value: Any) -> float:
    """A figure of a file, where NaN and infinities are null: NaN stands for them."""
    return math.nan if value is None else float(value)


def number(value: object, digits: int = 2) -> str:
    """A figure with so many digits after the point, fewer from 100 on; a dash where there is none."""
    if not isinstance(value, int | float) or value != value:
        return "-"
    if abs(value) >= 1e6 and digits:
        return f"{value:.3g}"
    digits = min(digits, 0 if abs(value) >= 1000 else 1) if abs(value) >= 100 else digits
    return f"{value:,.{digits}f}"


def percent(share: object, digits: int = 1) -> str:
    """0.25 as "25.0%"."""
    return f"{100 * share:.{digits}f}%" if isinstance(share, int | float) and share == share else "-"


def interval(low: object, high: object, digits: int = 2, scale: float = 1.0) -> str:
    """Two ends with a dash between; "" where they are not known."""
    if not (isinstance(low, int | float) and isinstance(high, int | float)) or low != low or high != high:
        return ""
    return f"{number(scale * low, digits)}{'-' if low >= 0 else ' to '}{number(scale * high, digits)}"


def skipped(reasons: Sequence[tuple[str, str]]) -> Html:
    """What was left out, a line for each reason: (what, why)."""
    return tag("div", *(tag("p", f"Skipped, {what}: {why}.", class_="faint") for what, why in reasons))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner not in (None, ""))
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text[:12] if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text) else text
