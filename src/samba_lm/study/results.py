"""What a study found, put together from its records: seeds averaged, models compared window by window."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_lm.eval.intervals import Mean, means_interval, student
from samba_lm.study.record import Record, read_records
from samba_lm.study.runner import StudyFile, read_study_file
from samba_lm.study.study import Evaluation, PaperTable, Run, Study


@dataclass(frozen=True)
class Cell:
    """One model's perplexity at one length."""

    length: int
    low: int
    """First position that counts (stream: where the bucket begins)."""
    windows: int
    tokens: int
    losses: tuple[float, ...]
    """Of each seed, nats a token."""
    means: tuple[float, ...]
    """Of each group of windows, over the seeds; empty where a record does not hold them (of more than 512 windows,
    those of earlier versions)."""
    sizes: tuple[int, ...]
    """Windows of each group."""
    errors: tuple[float, ...]
    """The standard error of each seed's loss, from the spread of the windows; empty where it is not known."""
    note: str

    @property
    def loss(self) -> float:
        """Mean over the seeds; NaN where nothing was measured."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the perplexity, from the spread of the windows.

        Where only the seeds' standard errors are known, their mean stands for that of the seeds' mean loss: it is never
        smaller.
        """
        if len(self.means) > 1:
            found = means_interval(self.means, self.sizes)
            return exp(found.low), exp(found.high)
        if self.windows < 2 or not self.errors:
            return math.nan, math.nan
        reach = student(self.windows - 1) * sum(self.errors) / len(self.errors)
        return exp(self.loss - reach), exp(self.loss + reach)

    @property
    def seeds(self) -> tuple[float, float] | None:
        """The lowest and the highest perplexity among the seeds; None for one."""
        return (exp(min(self.losses)), exp(max(self.losses))) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class View:
    """What a table shows of an evaluation: all of its text, or one window of it."""

    evaluation: Evaluation
    window: int | None = None

    @property
    def title(self) -> str:
        whole = self.evaluation.title or self.evaluation.name
        return whole if self.window is None else f"{whole}: {self.evaluation.apart[self.window]}"

    @property
    def stem(self) -> str:
        """What its files' names begin with."""
        return self.evaluation.name + ("" if self.window is None else f"-{self.window + 1}")


@dataclass(frozen=True)
class Found:
    """What was found of one run."""

    run: Run
    finals: tuple[Record, ...]
    """Its whole trainings that came to their end, by seed."""
    others: tuple[Record, ...]
    """Whole trainings that failed or diverged."""

    @property
    def title(self) -> str:
        return self.run.title or self.run.name

    def cells(self, view: View) -> dict[int, Cell]:
        """By length; without those that no seed was measured at."""
        name = view.evaluation.name
        measured = [each.results for record in self.finals if (each := record.evaluation(name)) is not None]
        rows: dict[int, list[dict[str, Any]]] = {}
        for results in measured:
            for row in results:
                rows.setdefault(row["length"], []).append(row if view.window is None else _window(row, view.window))
        return {length: _cell(length, rows[length]) for length in sorted(rows)}

    def mean(self, field: str) -> float:
        """Of a figure of the records, over the seeds; NaN where it is missing."""
        values = [value for record in self.finals if (value := getattr(record, field)) is not None]
        return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Results:
    """All of a study."""

    study: Study
    found: tuple[Found, ...]
    sweeps: dict[str, tuple[Record, ...]]
    """By family, by learning rate."""
    folder: Path
    command: tuple[str, ...]
    """That made it."""

    @property
    def groups(self) -> list[str]:
        """In the order of the study."""
        return list(dict.fromkeys(group for each in self.found for group in each.run.groups))

    @property
    def views(self) -> list[View]:
        """What is shown of the evaluations, in the order of the study."""
        found = []
        for each in self.study.evaluations:
            found += [View(each, i) for i in range(len(each.apart))] or [View(each)]
        return found

    def group(self, name: str) -> list[Found]:
        return [each for each in self.found if name in each.run.groups]

    def of(self, name: str) -> Found:
        return next(each for each in self.found if each.run.name == name)

    @property
    def reference(self) -> Found | None:
        """The run that the others are compared with, if it was trained."""
        name = self.study.reference
        return None if name is None or not self.of(name).finals else self.of(name)

    def paper(self, group: str) -> PaperTable | None:
        return next((table for table in self.study.paper if table.group == group), None)

    def beside(self, paper: PaperTable, name: str) -> list[float]:
        """A run's perplexities at the lengths that stand beside a published table; NaN where there is none."""
        evaluation = next((each for each in self.study.evaluations if each.name == paper.evaluation), None)
        cells = {} if evaluation is None else self.of(name).cells(View(evaluation))
        return [cells[length].perplexity if length in cells else math.nan for length in paper.lengths]

    @property
    def trained_length(self) -> int | None:
        """Tokens of a training row, where it is one for all."""
        lengths = {record.recipe["train"]["length"] for each in self.found for record in each.finals}
        return lengths.pop() if len(lengths) == 1 else None


def read_results(folder: Path) -> Results:
    """Read what `samba-lm study` wrote. Raises UserError for a folder that holds none, or a damaged file in it."""
    file: StudyFile = read_study_file(folder)
    records = read_records(folder)
    found = []
    for run in file.study.runs:
        finals = [records[key] for key in file.keys(run.name, "final") if key in records]
        done = sorted((record for record in finals if record.status == "done"), key=lambda record: record.seed)
        found.append(Found(run, tuple(done), tuple(record for record in finals if record.status != "done")))
    sweeps = {}
    for run in file.study.runs:
        swept = [records[key] for key in file.keys(run.name, "sweep") if key in records]
        if swept:
            sweeps[run.name] = tuple(sorted(swept, key=lambda record: record.lr))
    return Results(file.study, tuple(found), sweeps, folder, tuple(file.command))


def difference(ours: Cell, reference: Cell) -> Mean:
    """How much higher ``ours`` loss is, nats a token, with the 95% interval over the windows that both read.

    It is far narrower than that of either loss, because the text is the same. What another seed would change is not in
    it.
    """
    if ours.sizes != reference.sizes or not ours.means:
        apart = ours.loss - reference.loss
        return Mean(apart, math.nan, math.nan, min(ours.windows, reference.windows))
    return means_interval([a - b for a, b in zip(ours.means, reference.means, strict=True)], ours.sizes)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 where both have the same order, -1 where it is turned round; equal values share a rank.

    NaN where one of them has no order.
    """
    ranks = [[sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values] for values in (a, b)]
    return statistics.correlation(*ranks) if all(len(set(each)) > 1 for each in ranks) else math.nan


def exp(loss: float) -> float:
    """Perplexity of a loss, infinite where it is too large."""
    return math.nan if math.isnan(loss) else math.exp(loss) if loss < 700 else math.inf


def _cell(length: int, rows: Sequence[dict[str, Any]]) -> Cell:
    measured = [row for row in rows if row["windows"] and row["loss"] is not None]
    first = (measured or rows)[0]
    means: tuple[float, ...] = ()
    sizes = _sizes(first)
    if measured and sizes and all(_sizes(row) == sizes for row in measured):
        means = tuple(sum(each) / len(measured) for each in zip(*(row["means"] for row in measured), strict=True))
    errors = tuple(row["standard_error"] for row in measured if row.get("standard_error") is not None)
    low = 0 if first["positions"][0] == 1 else first["positions"][0]
    losses = tuple(row["loss"] for row in measured)
    errors = errors if len(errors) == len(measured) else ()
    return Cell(
        length, low, first["windows"], first["tokens"], losses, means, sizes if means else (), errors, first["note"]
    )


def _window(row: dict[str, Any], window: int) -> dict[str, Any]:
    """A row of one window alone; of no window where the record does not hold its mean."""
    means = row["means"][window : window + 1] if row.get("group", 1) == 1 else []
    alone = {"loss": means[0], "tokens": row["tokens"] // row["windows"]} if means else {"loss": None, "tokens": 0}
    return {**row, **alone, "windows": len(means), "means": means, "standard_error": None}


def _sizes(row: dict[str, Any]) -> tuple[int, ...]:
    """How many windows each of a row's means is of; nothing where there are none, or not those of all windows."""
    group, windows = row.get("group", 1), row["windows"]
    sizes = tuple(min(group, windows - i) for i in range(0, windows, group))
    return sizes if len(sizes) == len(row["means"]) else ()
