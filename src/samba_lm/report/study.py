"""Studies: what every run cost and reached, its perplexities, and how the learning rates were chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from samba_lm.eval.intervals import student
from samba_lm.figures import Axis, Curve, draw_curves, short
from samba_lm.report.found import StudyRun
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.page import curves_figure, facts, grid, how, named, note, section, table, with_note
from samba_lm.report.part import environment, interval, number, when, whole


@dataclass(frozen=True)
class Measured:
    """Perplexity at a length, with the ends of its 95% interval over the windows (NaN: one window)."""

    perplexity: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """A record of a training, and its evaluations by name and length."""

    name: str
    stage: str
    lr: float
    seed: int
    status: str
    reason: str
    parameters: int
    tokens: int
    minutes: float
    tokens_per_s: float | None
    train_loss: float | None
    val_loss: float | None
    curve: list[tuple[float, float]]
    evaluations: dict[str, dict[int, Measured]]
    windows: dict[str, dict[int, list[float]]]
    """By evaluation and length, each window's perplexity, where the record holds it."""


@dataclass(frozen=True)
class About:
    """What a study is called, the titles of its evaluations and runs, and the groups that each run stands in, as far as
    its own file tells."""

    title: str
    evaluations: dict[str, str]
    runs: dict[str, str]
    groups: dict[str, list[str]]
    apart: dict[str, list[str]]
    """By evaluation, what its windows are called, where each is to be shown by itself."""

    @classmethod
    def of(cls, folder: str, record: dict[str, Any]) -> About:
        """``record``: the study's own file; {} where there is none."""
        known = record.get("study")
        told = known if isinstance(known, dict) else {}
        evaluations, runs = (_titled(told.get(what)) for what in ("evaluations", "runs"))
        groups: dict[str, list[str]] = {}
        for name, row in runs.items():
            mine = row.get("groups")
            for group in mine if isinstance(mine, list) else []:
                groups.setdefault(str(group), []).append(name)
        title = "Study" if folder == "." else f"Study: {folder}"
        named = {name: row.get("apart") for name, row in evaluations.items()}
        apart = {name: list(map(str, words)) for name, words in named.items() if isinstance(words, list) and words}
        return cls(str(told.get("title") or title), _titles(evaluations), _titles(runs), groups, apart)

    def of_groups(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The runs ``names`` by group, in the study's order; those of none come last."""
        found = {group: [name for name in some if name in names] for group, some in self.groups.items()}
        rest = [name for name in names if not any(name in some for some in found.values())]
        found = {group: some for group, some in found.items() if some}
        return found | ({"Others" if found else "": rest} if rest else {})


def _titles(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What each is called; where two are called alike, with its name."""
    titles = {name: str(row.get("title") or name) for name, row in rows.items()}
    several = [title for title in titles.values() if list(titles.values()).count(title) > 1]
    return {name: f"{title} ({name})" if title in several else title for name, title in titles.items()}


def _titled(rows: object) -> dict[str, dict[str, Any]]:
    """The tables of a list, by their names."""
    known = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {str(row["name"]): row for row in known if row.get("name")}


def read(found: StudyRun) -> Run:
    """A record. Raises one of :data:`samba_lm.report.part.DAMAGED` for what is none."""
    record = found.record
    return Run(
        name=str(record["run"]),
        stage=str(record["stage"]),
        lr=float(record["lr"]),
        seed=int(record["seed"]),
        status=str(record["status"]),
        reason=str(record["reason"]),
        parameters=whole(record["parameters"]),
        tokens=whole(record["tokens"]),
        minutes=float(record["seconds"]) / 60,
        tokens_per_s=_maybe(record["tokens_per_s"]) if record.get("shared", 1) == 1 else None,
        train_loss=_maybe(record["train_loss"]),
        val_loss=_maybe(record["val_loss"]),
        curve=[(float(step), float(loss)) for step, loss in record["curve"] if loss is not None],
        evaluations={str(each["name"]): _lengths(each["results"]) for each in record["evaluations"]},
        windows={str(each["name"]): _windows(each["results"]) for each in record["evaluations"]},
    )


def _maybe(value: Any) -> float | None:
    return None if value is None else float(value)


def _lengths(rows: Sequence[dict[str, Any]]) -> dict[int, Measured]:
    found = {}
    for row in rows:
        if row["loss"] is None or not row["windows"]:
            continue
        loss, windows = float(row["loss"]), int(row["windows"])
        error = _maybe(row["standard_error"])
        reach = math.nan if error is None or windows < 2 else student(windows - 1) * error
        found[whole(row["length"], 1)] = Measured(*map(_exp, (loss, loss - reach, loss + reach)))
    return found


def _windows(rows: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    alone = (row for row in rows if row.get("group", 1) == 1)
    return {whole(row["length"], 1): [_exp(float(mean)) for mean in row["means"]] for row in alone}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def part(about: About, files: Sequence[StudyRun], runs: Sequence[Run], anchor: str) -> Html:
    """The page's part on one study: its records, and what was read of them."""
    runs = [replace(run, name=about.runs.get(run.name, run.name)) for run in runs]
    named_groups = {group: [about.runs.get(name, name) for name in some] for group, some in about.groups.items()}
    about = replace(about, groups=named_groups)
    inside: list[Html] = []
    for i, (group, names) in enumerate(about.of_groups(list(dict.fromkeys(run.name for run in runs))).items()):
        final = {name: [run for run in runs if run.name == name and run.stage == "final"] for name in names}
        done = {name: [run for run in some if run.status == "done"] for name, some in final.items()}
        done = {name: some for name, some in done.items() if some}
        if done:
            inside.append(_group(group, done, about, f"{anchor}-{i}"))
    sweep = [run for run in runs if run.stage == "sweep"]
    if sweep:
        order = {name: i for i, name in enumerate(about.runs.values())}
        inside.append(_sweep(sorted(sweep, key=lambda run: order.get(run.name, len(order)))))
    bad = [run for run in runs if run.status != "done"]
    if bad:
        told = [f"{run.name}, {run.stage}, rate {run.lr:g}, seed {run.seed}: {run.status}. {run.reason}" for run in bad]
        inside.append(tag("div", "Not finished:", tag("ul", *(tag("li", line) for line in told)), class_="notice"))
    return section(about.title, *inside, _made(files), anchor=anchor)


def _group(group: str, done: dict[str, list[Run]], about: About, anchor: str) -> Html:
    """Runs that are compared with one another: what they cost, their losses and perplexities."""
    styles = {name: i for i, name in enumerate(done)}
    parts = [tag("h3", group)] if group else []
    parts.append(_costs(done, styles))
    if any(run.curve for some in done.values() for run in some):
        parts.append(_losses(done, styles, anchor))
    evaluations = dict.fromkeys(name for some in done.values() for run in some for name in run.evaluations)
    for i, evaluation in enumerate(evaluations):
        title = about.evaluations.get(evaluation, evaluation)
        for j, name in enumerate(about.apart.get(evaluation, [])):
            parts.append(tag("h4", f"{title}: {name}"))
            alone = {run: [_alone(each, evaluation, j) for each in some] for run, some in done.items()}
            parts.append(_evaluation(evaluation, alone, styles, f"{anchor}-{i}-{j}"))
        if evaluation not in about.apart:
            parts.append(tag("h4", title))
            parts.append(_evaluation(evaluation, done, styles, f"{anchor}-{i}"))
    return join(parts)


def _alone(run: Run, evaluation: str, window: int) -> Run:
    """A run as measured on one window of an evaluation alone."""
    found = {
        length: Measured(values[window], math.nan, math.nan)
        for length, values in run.windows.get(evaluation, {}).items()
        if window < len(values)
    }
    return replace(run, evaluations={**run.evaluations, evaluation: found})


def _costs(done: dict[str, list[Run]], styles: dict[str, int]) -> Html:
    columns = "run,parameters,rate,seeds,tokens,training loss,validation loss,tokens/s,minutes"
    rows: list[list[object]] = []
    for name, runs in done.items():
        one = runs[0]
        row: list[object] = [named(name, styles[name]), f"{one.parameters / 1e6:.2f}M", f"{one.lr:g}", len(runs)]
        row += [f"{one.tokens / 1e6:.2f}M", _over(runs, "train_loss", 4), _over(runs, "val_loss", 4)]
        row += [_over(runs, "tokens_per_s", 0), _over(runs, "minutes", 1)]
        rows.append(row)
    words = "Means over the seeds. Losses in nats a token. No tokens/s of trainings that shared a device."
    return join([table(columns.split(","), rows), note(words)])


def _over(runs: Sequence[Run], what: str, digits: int) -> str:
    known = [value for run in runs if (value := getattr(run, what)) is not None]
    return number(sum(known) / len(known) if known else None, digits)


def _losses(done: dict[str, list[Run]], styles: dict[str, int], anchor: str) -> Html:
    curves = [
        Curve(name, [step for step, _ in runs[0].curve], [loss for _, loss in runs[0].curve], style=styles[name])
        for name, runs in done.items()
        if runs and runs[0].curve
    ]
    x, y = Axis("step"), Axis("training loss, nats a token")
    names = [(curve.name, curve.style) for curve in curves]
    caption = "The training loss by the step, of the first seed."
    return curves_figure(
        lambda size: draw_curves(curves, x, y, size=size, legend=False), f"{anchor}-loss", caption, names
    )


def _evaluation(evaluation: str, done: dict[str, list[Run]], styles: dict[str, int], anchor: str) -> Html:
    """The seeds' perplexity at each length; what it spans: the seeds, or of one seed the windows' interval."""
    means: dict[str, dict[int, tuple[float, float, float, int]]] = {}
    for name, runs in done.items():
        found: dict[int, list[Measured]] = {}
        for run in runs:
            for length, measured in run.evaluations.get(evaluation, {}).items():
                found.setdefault(length, []).append(measured)
        if found:
            means[name] = {length: _together(some) for length, some in sorted(found.items())}
    if not means:
        return note("Nothing was measured here, or the losses were not finite.")
    lengths = sorted({length for some in means.values() for length in some})
    curves = []
    for name, some in means.items():
        values, lows, highs = ([each[i] for each in some.values()] for i in range(3))
        curves.append(Curve(name, list(some), values, lows, highs, styles[name]))
    x, y = Axis("tokens", "log2"), Axis("perplexity", "log10")
    caption = (
        "Perplexity: lower is better. Bars: the span of the seeds, or with one seed the 95% interval over the windows "
        "of the text."
    )
    figure = curves_figure(
        lambda size: draw_curves(curves, x, y, size=size, legend=False),
        anchor,
        caption,
        [(name, styles[name]) for name in means],
    )
    best = {length: min(some[length][0] for some in means.values() if length in some) for length in lengths}

    def cell(name: str, length: int) -> object:
        if length not in means[name]:
            return "-"
        mean, low, high, seeds = means[name][length]
        ends = join([interval(low, high), *([tag("br"), f"{seeds} seeds"] if seeds > 1 else [])])
        return with_note(number(mean), ends, best=mean == best[length])

    names = [named(name, styles[name]) for name in means]
    cells = [[cell(name, length) for length in lengths] for name in means]
    words = note("Small: what the figure's bars show. Bold: the lowest.")
    return join([figure, grid("tokens", list(map(short, lengths)), names, cells), words])


def _together(some: Sequence[Measured]) -> tuple[float, float, float, int]:
    """The perplexity of the seeds' mean loss, as in the study's own tables, its span, and how many seeds there are."""
    values = [each.perplexity for each in some]
    if len(some) == 1:
        return some[0].perplexity, some[0].low, some[0].high, 1
    return math.exp(sum(map(math.log, values)) / len(values)), min(values), max(values), len(values)


def _sweep(sweep: Sequence[Run]) -> Html:
    rates = sorted({run.lr for run in sweep})
    names = list(dict.fromkeys(run.name for run in sweep))
    cells = []
    for name in names:
        mine = {run.lr: run for run in sweep if run.name == name}
        losses = {rate: run.val_loss for rate, run in mine.items() if run.val_loss is not None and run.status == "done"}
        lowest = min(losses.values(), default=None)
        cells.append([_rate(mine.get(rate), losses.get(rate), lowest) for rate in rates])
    shown = grid("rate", [f"{rate:g}" for rate in rates], [named(name) for name in names], cells)
    words = "Validation loss, nats a token, after the sweep's short trainings. Bold: the lowest, whose rate is taken."
    return join([tag("h3", "Learning rates"), shown, note(words)])


def _rate(run: Run | None, loss: float | None, lowest: float | None) -> object:
    if run is None:
        return ""
    return run.status if loss is None else tag("td", number(loss, 4), class_="best" if loss == lowest else None)


def _made(files: Sequence[StudyRun]) -> Html:
    folder = files[0].study
    provenance = files[0].record.get("provenance")
    told = provenance if isinstance(provenance, dict) else {}
    devices = dict.fromkeys(str(file.record["device"]) for file in files if file.record.get("device"))
    moments = [file.record.get(name) for file in files for name in ("started", "finished")]
    times = sorted(str(moment) for moment in moments if moment)
    pairs = [pair for pair in environment(folder, told) if pair[0] not in ("device", "file", "time")]
    span: list[tuple[str, object]] = [("from", when(times[0])), ("to", when(times[-1]))] if times else []
    return how(
        [
            tag("code", "samba-lm study RECIPES"),
            facts([("folder", folder), ("records", len(files)), ("device", ", ".join(devices)), *pairs, *span]),
        ]
    )
