"""The results of `eval passkey` and `eval phonebook` on disk: a JSON file that a later run adds to, and a table."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_lm.cli.output import write_json
from samba_lm.errors import UserError
from samba_lm.files import read_json, write_text

if TYPE_CHECKING:
    from samba_lm.eval.recall import Cell, Task

SAVE_EVERY = 5.0
"""Seconds between two writings of the file, at least."""
WHO = ("weights_sha256", "config", "tokenizer", "dtype", "quantized")
"""What tells one model from another."""

Model = dict[str, object]
"""A model's facts, :data:`WHO` among them."""


class Results:
    """The cells of several models with one task's settings, in a JSON file (or, without a path, in memory).

    Cells that the file already holds are kept. Raises UserError where it holds something else.
    """

    def __init__(self, path: Path | None, task: Task) -> None:
        self.path, self.task = path, task
        self.models: list[tuple[Model, dict[tuple[int, float | None], Cell]]] = []
        self._saved = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def of(self, model: Model) -> list[Cell]:
        """A model's cells of the task's plan, in its order."""
        cells = self._cells(model)
        return [cells[key] for key in self.task.plan.cells if key in cells]

    def add(self, model: Model, cell: Cell) -> None:
        """Note a cell; now and then the file is written."""
        self._cells(model)[cell.key] = cell
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file, if there is one and anything to write."""
        self._saved = time.monotonic()
        if self.path is None or not self.models:
            return
        models = [
            {**model, "by_size": by_size(list(cells.values())), "cells": [_row(cell) for cell in _in_order(cells)]}
            for model, cells in self.models
        ]
        settings = self.task.settings()
        head = {"unit": self.task.unit, "settings": settings, "settings_sha256": self.task.fingerprint()}
        write_json(self.path, {"task": self.task.name, **head, "models": models})

    def write_csv(self, path: Path, models: Sequence[Model]) -> None:
        """Write the models' cells as rows, one for each."""
        rows = [{"checkpoint": model["name"], **_counts(cell)} for model in models for cell in self.of(model)]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["checkpoint"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            blank = {key: "" for key, value in row.items() if value is None or value != value}
            writer.writerow(row | blank)
        write_text(path, text.getvalue())

    def _cells(self, model: Model) -> dict[tuple[int, float | None], Cell]:
        for known, cells in self.models:
            if all(known[key] == model[key] for key in WHO):
                return cells
        self.models.append((model, {}))
        return self.models[-1][1]

    def _read(self, path: Path) -> None:
        from samba_lm.eval.recall import Cell, Trial

        held = read_json(path)
        try:
            same = held["settings_sha256"] == self.task.fingerprint()
            before = held["settings"]
            for model in held["models"] if same else []:
                rows = [row for row in model["cells"] if not row["skipped"]]  # that may have changed
                cells = [
                    Cell(row["size"], row["depth"], tuple(Trial(**trial) for trial in row["trials"]), row["seconds"])
                    for row in rows
                ]
                facts = {key: value for key, value in model.items() if key not in ("by_size", "cells")}
                assert all(key in facts for key in WHO)
                self.models.append((facts, {cell.key: cell for cell in cells}))
        except (AssertionError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is no file of `eval {self.task.name}`: give another with --json.") from None
        if not same:
            raise UserError(
                f"{path} holds results with {_difference(before, self.task.settings())}: give the same settings to go "
                "on, or another file with --json."
            )


def by_size(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """What was counted at each size, over all depths."""
    from samba_lm.eval.recall import Count

    sizes = sorted({cell.size for cell in cells})
    counts = [(size, Count.of([cell for cell in cells if cell.size == size])) for size in sizes]
    return [{"size": size, **_count(count)} for size, count in counts]


def _in_order(cells: Mapping[tuple[int, float | None], Cell]) -> list[Cell]:
    return sorted(cells.values(), key=lambda cell: (cell.size, cell.depth or 0))


def _row(cell: Cell) -> dict[str, object]:
    return {**_counts(cell), "trials": [asdict(trial) for trial in cell.trials]}


def _counts(cell: Cell) -> dict[str, Any]:
    from samba_lm.eval.recall import Count

    head = {"size": cell.size, "depth": cell.depth, **_count(Count.of([cell]))}
    return head | {"seconds": round(cell.seconds, 3), "skipped": cell.skipped}


def _count(count: Any) -> dict[str, object]:
    low, high = count.interval if count.total else (math.nan, math.nan)
    return {**asdict(count), "accuracy": count.accuracy, "low": low, "high": high}


def _difference(before: Any, now: Mapping[str, object]) -> str:
    keys = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
    return ", ".join(f"{key} = {before.get(key)!r}, not {now[key]!r}" for key in keys[:2]) or "other settings"
