"""The page of a folder's results: a part for each task, for trainings and for studies, models named alike in all."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samba_lm import __version__
from samba_lm.errors import UserError
from samba_lm.report import study, training
from samba_lm.report.entropy import ENTROPY
from samba_lm.report.found import Found, Problem, ResultFile, search
from samba_lm.report.harness import HARNESS
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.models import Key, Model, key, name_models
from samba_lm.report.page import named, page, paragraph, section, table
from samba_lm.report.part import DAMAGED, Entry, Group, Task, provenance
from samba_lm.report.perplexity import PERPLEXITY
from samba_lm.report.recall import PASSKEY, PHONEBOOK
from samba_lm.report.summaries import SUMMARIES

TASKS: dict[str, Task[Any]] = {
    task.name: task for task in (PERPLEXITY, PASSKEY, PHONEBOOK, HARNESS, SUMMARIES, ENTROPY)
}
"""In the page's order."""
LOOKED_FOR = (
    "files that `samba-lm eval ... --json FILE` wrote, metrics.jsonl of `samba-lm train`, and the records of a study"
)


def results_page(folder: Path) -> tuple[str, Found]:
    """The page of what is in ``folder``, and what was found; damaged files are named in both.

    Raises UserError where there is nothing to show.
    """
    found = search(folder)
    groups, studies = _groups(found), _studies(found)
    trainings = _trainings(found, folder.resolve().name)
    if not found:
        first = found.problems[0] if found.problems else None
        others = f" ({len(found.problems)} files like that)" if len(found.problems) > 1 else ""
        told = "" if first is None else f" Of these {first.path} {first.why}{others}."
        raise UserError(f"{folder} holds no results: it is searched for {LOOKED_FOR}.{told}")
    parts: list[tuple[str, str, Html]] = []  # title, anchor, HTML
    models = {entry.model.label: entry.model for _, group in groups for entry in group.entries}
    if models:
        parts.append(("Models", "models", _models(sorted(models.values(), key=lambda model: model.style))))
    for task in TASKS.values():
        mine = [group for name, group in groups if name == task.name]
        if mine:
            parts.append((task.title, task.name, _part(task, mine)))
    if trainings:
        styles = {label: model.style for label, model in models.items()}
        parts.append(("Training", "training", training.part(trainings, styles)))
    for i, (where, runs) in enumerate(studies.items()):
        files = [file for file in found.studies if file.study == where]
        about = study.About.of(where, found.study_files.get(where, {}))
        parts.append((about.title, f"study-{i}", study.part(about, files, runs, f"study-{i}")))
    title = f"Results: {folder.resolve().name or folder}"
    contents = [(title, anchor) for title, anchor, _ in parts]
    return page(title, _opening(folder, found, contents), *(part for _, _, part in parts)), found


def _groups(found: Found) -> list[tuple[str, Group[Any]]]:
    """Files with the same task and settings together. Those that cannot be read move to the problems."""
    read: dict[str, list[tuple[dict[str, Any], Any]]] = {}
    kept: list[ResultFile] = []
    for file in found.results:
        task = TASKS.get(file.task)
        if task is None:
            found.problems.append(Problem(file.path, f"has results of {file.task!r}, which this version cannot show"))
            continue
        try:
            read[file.path] = [(facts, task.read(facts)) for facts in file.record["models"]]
        except DAMAGED:
            found.problems.append(Problem(file.path, f"is damaged, or no file of `eval {file.task}`: measure again"))
            continue
        kept.append(file)
    found.results[:] = kept
    models = name_models([facts for file in kept for facts, _ in read[file.path]])
    together: dict[tuple[str, str], list[ResultFile]] = {}
    for file in kept:
        together.setdefault((file.task, file.group), []).append(file)
    return [
        (name, Group(f"{name}-{i}", files[0].settings, files, _entries(TASKS[name], files, read, models)))
        for i, ((name, _), files) in enumerate(together.items())
    ]


def _studies(found: Found) -> dict[str, list[study.Run]]:
    """The runs of each study's folder. Damaged records move to the problems; a study's trainings are in its records."""
    studies: dict[str, list[study.Run]] = {}
    kept = []
    for file in found.studies:
        try:
            run = study.read(file)
        except DAMAGED:
            found.problems.append(Problem(file.path, "is a damaged record of a study: run the study again"))
            continue
        kept.append(file)
        studies.setdefault(file.study, []).append(run)
    found.studies[:] = kept
    inside = tuple("" if where == "." else f"{where}/" for where in studies)
    if inside:
        found.trainings[:] = [each for each in found.trainings if not each.path.startswith(inside)]
    return studies


def _trainings(found: Found, name: str) -> list[training.Run]:
    """What was read of each training; damaged ones move to the problems. ``name``: of the folder itself."""
    runs, kept = [], []
    for each in found.trainings:
        try:
            runs.append(training.read(each, name if each.path == "." else each.path))
        except DAMAGED:
            found.problems.append(Problem(f"{each.path}/metrics.jsonl", "is damaged: train anew to have it whole"))
            continue
        kept.append(each)
    found.trainings[:] = kept
    return runs


def _entries(
    task: Task[Any],
    files: Sequence[ResultFile],
    read: dict[str, list[tuple[dict[str, Any], Any]]],
    models: dict[Key, Model],
) -> list[Entry[Any]]:
    """Each model once, with what all files say of it; of what several say, the one that was written last."""
    found: dict[Key, Entry[Any]] = {}
    for file in sorted(files, key=lambda file: str(file.record.get("time", ""))):
        for facts, figures in read[file.path]:
            entry, before = Entry(models[key(facts)], figures, facts), found.get(key(facts))
            if before is not None:
                merged = task.merge(before.facts, facts)
                entry = Entry(entry.model, task.read(merged), merged)
            found[key(facts)] = entry
    return sorted(found.values(), key=lambda entry: entry.model.style)


def _models(models: Sequence[Model]) -> Html:
    """What is compared."""
    rows = []
    for model in models:
        facts = model.facts
        config = facts.get("model")
        parameters = facts.get("parameters")
        rows.append([
            named(model.label, model.style),
            str(config.get("name", "-")) if isinstance(config, dict) else "-",
            tag("td", f"{parameters / 1e6:,.2f}M" if isinstance(parameters, int) and parameters < 1 << 53 else "-"),
            " in ".join(str(facts[fact]) for fact in ("dtype", "quantized") if facts.get(fact)),
            tag("code", str(facts.get("weights_sha256") or "random")[:8]),
            tag("code", str(facts.get("tokenizer") or "none")[:8]),
            tag("code", facts.get("checkpoint", "-")),
        ])  # fmt: skip
    headings = ["model", "architecture", "parameters", "numbers", "weights", "tokenizer", "checkpoint"]
    return section("Models", table(headings, rows, texts=range(1, 7)), anchor="models")


def _part(task: Task[Any], groups: Sequence[Group[Any]]) -> Html:
    inside: list[Html] = []
    for group in groups:
        heading = task.heading(group)
        if heading:
            inside.append(tag("h3", heading))
        inside.append(task.render(group))
        inside.append(provenance(group.files, group.settings))
    return section(task.title, paragraph(task.about), *inside, anchor=task.name)


def _opening(folder: Path, found: Found, contents: Sequence[tuple[str, str]]) -> Html:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    counted = [
        (len(found.results), "result file"),
        (len(found.trainings), "training"),
        (len(found.studies), "study run"),
    ]
    told = ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counted if count)
    parts = [
        paragraph(tag("span", f"{told}. Made {now} by samba-lm {__version__}: ", class_="faint"),
                  tag("code", f"samba-lm report {folder}")),
        tag("nav", *(tag("a", title, href=f"#{anchor}") for title, anchor in contents)),
    ]  # fmt: skip
    if found.problems:
        lines = [tag("li", tag("code", problem.path), f" {problem.why}") for problem in found.problems]
        parts.append(tag("div", "Left out:", tag("ul", *lines), class_="notice"))
    return join(parts)
