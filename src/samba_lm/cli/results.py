"""What an `eval` command has measured, on disk: a JSON file that a later run adds to, and a table of it."""

from __future__ import annotations

import abc
import contextlib
import csv
import hashlib
import io
import json
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from rich.console import Console

from samba_lm.cli.output import write_json
from samba_lm.errors import UserError
from samba_lm.files import locked, read_json, write_text
from samba_lm.report.models import WHO

T = TypeVar("T")

SAVE_EVERY = 5.0
"""Seconds between two writings of the file, at least."""
STOPPED = "Stopped early. The same command goes on."
"""Said of an interrupted run that leaves a file to go on from."""

Model = dict[str, object]
"""A model's facts, :data:`WHO` among them."""


class Results(abc.ABC, Generic[T]):
    """What was measured of several models with the same settings, in a JSON file (or, without a path, in memory).

    A task says what its items are, each the result of one piece of work: see the methods below :meth:`write_csv`. Items
    that the file already holds are kept. As a context (``with Results(...) as it:``) it holds the file against other
    commands, and writes it at the end, also of work that was broken off.

    Args:
        path: of the file.
        settings: all that decides an item but the model and the item's key. Plain data.
        head: more to write at the beginning of the file.

    Raises:
        UserError: the file holds something else, was made with other settings, or is another command's at the moment.
    """

    task: str
    """What the task is called, `eval TASK`."""
    items: str
    """What the list of a model's items is called in the file."""

    def __init__(
        self, path: Path | None, settings: Mapping[str, object], head: Mapping[str, object] | None = None
    ) -> None:
        self.path, self.settings, self.head = path, settings, dict(head or {})
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._models: list[tuple[Model, dict[Hashable, T]]] = []
        self._saved = time.monotonic()
        self._lock = contextlib.ExitStack()
        if path is not None:
            busy = f"Another command is writing {path}: wait for it, or give another file with --json."
            with contextlib.ExitStack() as lock:
                lock.enter_context(locked(path.with_name(f".{path.name}.lock"), busy))
                if path.exists():
                    self._read(path)
                self._lock = lock.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._lock:
            self.save()
        if isinstance(error, KeyboardInterrupt) and self.path is not None:
            Console().print(STOPPED, markup=False, highlight=False)

    def of(self, model: Model) -> list[T]:
        """A model's items, in order."""
        return self._in_order(self._held(model))

    def add(self, model: Model, item: T) -> None:
        """Note an item; now and then the file is written."""
        self._held(model)[self.key(item)] = item
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file, if there is one and anything to write."""
        self._saved = time.monotonic()
        if self.path is None or not self._models:
            return
        models = []
        for model, held in self._models:
            items = self._in_order(held)
            models.append({**model, **self.summary(items), self.items: [self.row(item) for item in items]})
        head = {**self.head, "settings": self.settings, "settings_sha256": self.fingerprint}
        write_json(self.path, {"task": self.task, **head, "models": models})

    def write_csv(self, path: Path, models: Sequence[Model]) -> None:
        """Write these models' items as rows, one for each."""
        write_rows(
            path,
            [{"checkpoint": model["name"], **self.csv_row(item)} for model in models for item in self.of(model)],
        )

    @abc.abstractmethod
    def key(self, item: T) -> Hashable:
        """What tells an item from the model's others."""

    @abc.abstractmethod
    def order(self, item: T) -> Any:
        """What items are sorted by."""

    @abc.abstractmethod
    def row(self, item: T) -> dict[str, object]:
        """An item as plain data for JSON, where NaN becomes null."""

    @abc.abstractmethod
    def item(self, row: Any) -> T | None:
        """What :meth:`row` gave, back from JSON; None for what is to be measured anew, such as what was skipped.

        Any KeyError, TypeError, ValueError or AttributeError says that the file is none of this task's.
        """

    def csv_row(self, item: T) -> dict[str, object]:
        """An item as a row of a table, its columns the same for all."""
        return self.row(item)

    def summary(self, items: Sequence[T]) -> dict[str, object]:
        """More about a model, for JSON."""
        return {}

    def _held(self, model: Model) -> dict[Hashable, T]:
        for known, items in self._models:
            if all(known[key] == model[key] for key in WHO):
                return items
        self._models.append((model, {}))
        return self._models[-1][1]

    def _in_order(self, held: Mapping[Hashable, T]) -> list[T]:
        return sorted(held.values(), key=self.order)

    def _read(self, path: Path) -> None:
        found = read_json(path)
        try:
            if found["task"] != self.task or not isinstance(found["models"], list):
                raise KeyError
            same = found["settings_sha256"] == self.fingerprint
            before = found["settings"]
            drop = {self.items, *self.summary([])}
            for model in found["models"] if same else []:
                facts = {key: value for key, value in model.items() if key not in drop}
                facts.setdefault("adapter_sha256", None)  # which older files do not tell
                if not facts.keys() >= set(WHO):
                    raise KeyError
                items = [item for row in model[self.items] if (item := self.item(row)) is not None]
                self._models.append((facts, {self.key(item): item for item in items}))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(f"{path} is no file of `eval {self.task}`: give another with --json.") from None
        if not same:
            raise UserError(
                f"{path} holds results with {_difference(before, self.settings)}: give the same settings to go on, or "
                "another file with --json."
            )


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of the same columns as CSV, with nothing where a value is None or NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["checkpoint"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None or value != value else value for key, value in row.items()})
    write_text(path, text.getvalue())


def _difference(before: Any, now: Mapping[str, object]) -> str:
    if not isinstance(before, dict):
        return "other settings"
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return ", ".join(_change(key, before.get(key), now.get(key)) for key in keys[:2]) or "other settings"


def _change(key: str, before: object, now: object) -> str:
    if key.endswith("sha256"):  # which says nothing to people
        return f"other {key.removesuffix('sha256').strip('_') or 'data'}"
    return f"{key} = {before!r}, not {now!r}"
