"""The results of `eval passkey` and `eval phonebook` on disk: the cells of a plan, each with its texts' answers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_lm.cli.results import Model, Results

if TYPE_CHECKING:
    from samba_lm.eval.recall import Cell, Count, Task, Trial


class RecallResults(Results["Cell"]):
    """The cells of several models; see :class:`Results`."""

    items = "cells"

    def __init__(self, path: Path | None, task: Task) -> None:
        self.task, self.plan, self.unit = task.name, task.plan, task.unit
        super().__init__(path, task.settings(), {"unit": task.unit})

    def of(self, model: Model) -> list[Cell]:
        """A model's cells of the plan, in its order."""
        cells = {cell.key: cell for cell in super().of(model)}
        return [cells[key] for key in self.plan.cells if key in cells]

    def key(self, item: Cell) -> Hashable:
        return item.key

    def order(self, item: Cell) -> Any:
        return item.size, item.depth or 0

    def row(self, item: Cell) -> dict[str, object]:
        return {**self.csv_row(item), "trials": [asdict(trial) for trial in item.trials]}

    def item(self, row: Any) -> Cell | None:
        from samba_lm.eval.recall import Cell, Trial

        if row["skipped"]:  # that may have changed
            return None
        size, depth = row["size"], row["depth"]
        if not isinstance(size, int) or not 1 <= size < 1 << 53 or not (depth is None or 0 <= float(depth) <= 1):
            raise ValueError
        trials = tuple(Trial(**trial) for trial in row["trials"])
        if len(trials) != self.plan.trials or not all(map(self._whole, trials)):
            raise ValueError
        return Cell(size, None if depth is None else float(depth), trials, float(row["seconds"]))

    def _whole(self, trial: Trial) -> bool:
        """Whether a text's answer has all that was asked for, each of its kind."""
        controls = (trial.control, trial.control_right) if self.plan.control else ("", False)
        texts, told = (trial.answer, trial.written, controls[0]), (trial.right, trial.exact, controls[1])
        return all(isinstance(each, str) for each in texts) and all(isinstance(each, bool) for each in told)

    def csv_row(self, item: Cell) -> dict[str, object]:
        from samba_lm.eval.recall import Count

        head = {"size": item.size, "depth": item.depth, **_count(Count.of([item]))}
        return head | {"seconds": round(item.seconds, 3), "skipped": item.skipped}

    def summary(self, items: Sequence[Cell]) -> dict[str, object]:
        return {"by_size": by_size(items)}


def by_size(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """What was counted at each size, over all depths."""
    from samba_lm.eval.recall import Count

    sizes = sorted({cell.size for cell in cells})
    counts = [(size, Count.of([cell for cell in cells if cell.size == size])) for size in sizes]
    return [{"size": size, **_count(count)} for size, count in counts]


def _count(count: Count) -> dict[str, object]:
    low, high = count.interval if count.total else (math.nan, math.nan)
    return {**asdict(count), "accuracy": count.accuracy, "low": low, "high": high}
