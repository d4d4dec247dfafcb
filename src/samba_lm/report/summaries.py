"""Summaries: how near a model's are to people's, by ROUGE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from samba_lm.report.markup import Html, join
from samba_lm.report.page import named, note, table, with_note
from samba_lm.report.part import Group, Task, interval, number, real, skipped, whole

SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclass(frozen=True)
class Summaries:
    """Mean F-measures, 0 to 1, as (mean, low, high); how many texts; tokens of a summary; why others were left out."""

    scores: dict[str, tuple[float, float, float]]
    count: int
    tokens: float
    skips: list[str]


def read(entry: dict[str, Any]) -> Summaries:
    """A model's entry of a file of ``eval summarize``."""
    written = [sample for sample in entry["samples"] if not sample["skipped"]]
    skips = [str(sample["skipped"]) for sample in entry["samples"] if sample["skipped"]]
    scores = {}
    for name in SCORES if written else ():
        found = entry["scores"][name]
        mean, low, high = (real(found[part]) for part in ("mean", "low", "high"))
        scores[name] = mean, low, high
    tokens = sum(whole(sample["new_tokens"]) for sample in written) / max(1, len(written))
    return Summaries(scores, len(written), tokens, skips)


def _render(group: Group[Summaries]) -> Html:
    best = {
        name: max((entry.figures.scores[name][0] for entry in group.entries if entry.figures.scores), default=math.nan)
        for name in SCORES
    }
    rows = [
        [
            named(entry.model.label, entry.model.style),
            *(_cell(entry.figures, name, best[name], len(group.entries)) for name in SCORES),
            f"{entry.figures.count:,}",
            number(entry.figures.tokens if entry.figures.count else None, 0),
        ]
        for entry in group.entries
    ]
    words = "Times 100. Small: the 95% interval over the texts. Bold: the highest."
    reasons = [
        (f"{len([each for each in entry.figures.skips if each == why])} of {entry.model.label}", why)
        for entry in group.entries
        for why in dict.fromkeys(entry.figures.skips)
    ]
    headings = ["model", *SCORES.values(), "summaries", "tokens each"]
    return join([table(headings, rows), note(words), skipped(reasons)])


def _cell(found: Summaries, name: str, best: float, models: int) -> object:
    if name not in found.scores:
        return "-"
    mean, low, high = found.scores[name]
    return with_note(number(100 * mean, 1), interval(low, high, 1, 100), best=models > 1 and mean == best)


def _heading(group: Group[Summaries]) -> str:
    task = {"squality": "SQuALITY", "qmsum": "QMSum", "govreport": "GovReport"}
    name = str(group.settings.get("task", ""))
    return task.get(name, name)


SUMMARIES = Task(
    "summarize",
    "Summaries",
    "A long text is read whole and summarised, greedily; the summary is compared with people's.",
    read,
    _heading,
    _render,
)
