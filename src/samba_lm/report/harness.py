"""Scores of lm-evaluation-harness's tasks and of HumanEval, a row for each task and a column for each model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from samba_lm.eval.harness.run import Metric, Score
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.page import named, note, table, with_note
from samba_lm.report.part import Group, Task, interval, number, percent, real, whole

Row = tuple[str, str, str, int, str, str | None]
"""A task, its metric and filter, worked examples, version and data: figures of two are never in one row."""
LOW_IS_GOOD = ("perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity")


def read(entry: dict[str, Any]) -> list[Score]:
    """A model's entry of a file of ``eval harness``."""
    return [_checked(Score.of(row)) for row in entry["tasks"]]


def _checked(score: Score) -> Score:
    """With fields of the types that they should have, or one of :data:`samba_lm.report.part.DAMAGED`."""
    metrics = [
        Metric(str(each.name), str(each.filter), real(each.value), None, real(each.low), real(each.high))
        for each in score.metrics
    ]
    return replace(
        score,
        task=str(score.task),
        documents=whole(score.documents),
        fewshot=whole(score.fewshot),
        version=str(score.version),
        metrics=tuple(metrics),
        data_sha256=None if score.data_sha256 is None else str(score.data_sha256),
    )


def _render(group: Group[list[Score]]) -> Html:
    found: dict[Row, dict[int, tuple[Score, Metric]]] = {}
    for i, entry in enumerate(group.entries):
        for score in entry.figures:
            for metric in score.metrics:
                row = score.task, metric.name, metric.filter, score.fewshot, score.version, score.data_sha256
                found.setdefault(row, {})[i] = score, metric
    several = {row[:4] for row in found if sum(other[:4] == row[:4] for other in found) > 1}
    rows = []
    for row, scores in sorted(found.items(), key=lambda item: (item[0][0], list(found).index(item[0]))):
        values = {metric.value for _, metric in scores.values() if math.isfinite(metric.value)}
        best = (min if row[1] in LOW_IS_GOOD else max)(values) if len(values) > 1 else math.nan
        cells = [_cell(scores.get(i), best) for i in range(len(group.entries))]
        rows.append([_called(row, next(iter(scores.values()))[0], row[:4] in several), *cells])
    heading = ["task", *(named(entry.model.label, entry.model.style) for entry in group.entries)]
    words = "Small: the 95% interval over the documents. Bold: the best."
    return join([table(heading, rows), note(words)])


def _called(row: Row, score: Score, several: bool) -> Html:
    task, metric, chosen, shots, version, data = row
    words = [metric if chosen == "none" else f"{metric} ({chosen})", f"{score.documents:,} documents"]
    words += [f"{shots} shots"] if shots else []
    words += [f"version {version}, data {(data or 'of the hub')[:8]}"] if several else []
    return tag("td", task, tag("small", ", ".join(words)))


def _cell(found: tuple[Score, Metric] | None, best: float) -> object:
    if found is None:
        return "-"
    metric = found[1]
    value = percent(metric.value) if metric.is_share else number(metric.value)
    ends = interval(metric.low, metric.high, *((1, 100) if metric.is_share else (2, 1)))
    return with_note(value, ends, best=metric.value == best)


def _heading(group: Group[list[Score]]) -> str:
    limit = group.settings.get("limit")
    return f"Only the first {limit} documents of each task" if isinstance(limit, int) else ""


HARNESS = Task(
    "harness",
    "Downstream tasks",
    "Tasks of lm-evaluation-harness, with its own prompts and metrics; HumanEval's programs are run in a sandbox.",
    read,
    _heading,
    _render,
    items="tasks",
    told_by=("task",),
)
