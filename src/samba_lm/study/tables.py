"""A study's results as files: Markdown to read, CSV and JSON to compute with, figures, and a README that names them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samba_lm.errors import UserError
from samba_lm.eval.protocols import MEANING
from samba_lm.figures import save_figure, short
from samba_lm.files import write_text
from samba_lm.study.figures import difference_figure, percent, perplexity_figure, sweep_figure
from samba_lm.study.record import Record, plain
from samba_lm.study.results import Cell, Found, Results, View, difference, rank_correlation, read_results
from samba_lm.study.study import Evaluation, PaperTable
from samba_lm.train.progress import count

BEGIN, END = "<!-- tables: written by `samba-lm study table` -->", "<!-- end of tables -->"
EMPTY = "–"  # noqa: RUF001 - a dash
EVEN = 1.5
"""An interval whose ends are further apart than this factor is not shown by half of its width: it is not symmetric."""


def write_tables(folder: Path, out: Path) -> list[Path]:
    """Write the tables and figures of the study in ``folder`` to ``out``; the files, in order.

    A README.md that is there keeps what stands outside the two marks; without them it is left alone. Raises UserError
    where there is no study, or nothing of it is done.
    """
    results = read_results(folder)
    if not results.sweeps and not any(each.finals or each.others for each in results.found):
        raise UserError(f"{folder} has no training that has ended: `samba-lm study` makes them.")
    written = []
    figures: list[tuple[str, str]] = []

    def draw(name: str, title: str, figure: Any) -> None:
        if figure is not None:
            save_figure(out / name, figure)
            figures.append((name, title))
            written.append(out / name)

    for group in results.groups:
        models = [each for each in results.group(group) if each.finals]
        for view in results.views:
            stem, name = f"{slug(group)}-{view.stem}", f"{group}: {view.title}"
            draw(f"{stem}.png", name, perplexity_figure(results, models, view))
            draw(f"{stem}-difference.png", f"{name}, differences", difference_figure(results, models, view))
    draw("sweep.png", "Learning rates", sweep_figure(results))
    for name, text in (
        ("tables.md", markdown(results)),
        ("perplexity.csv", table_csv(perplexity_rows(results))),
        ("runs.csv", table_csv(run_rows(results))),
        ("results.json", json.dumps(plain(as_json(results)), indent=1, ensure_ascii=False) + "\n"),
    ):
        write_text(out / name, text)
        written.append(out / name)
    readme = out / "README.md"
    renewed = readme_text(results, out, figures, readme.read_text(encoding="utf-8") if readme.exists() else None)
    if renewed is not None:
        write_text(readme, renewed)
        written.append(readme)
    return written


def markdown(results: Results) -> str:
    """All tables."""
    parts = [f"# {results.study.title}", _legend(results)]
    for group in results.groups:
        models = results.group(group)
        parts += [f"## {group}", grid(*_runs(results, models))]
        for view in results.views:
            if any(each.cells(view) for each in models):
                parts += [f"### {view.title}", _protocol(view.evaluation)]
                parts.append(grid(*_perplexities(models, view)))
                if results.reference is not None and len(models) > 1:
                    parts += [
                        f"Perplexity above {results.reference.title}'s in percent (x4: four times it){_with(view)}:",
                        grid(*_differences(results.reference, models, view)),
                    ]
                    if _unpaired(results.reference, models, view):
                        parts.append(
                            "Without an interval: those trainings were measured by a version that kept no means of "
                            "more than 512 windows; measured anew, they have one."
                        )
        paper = results.paper(group)
        if paper is not None:
            parts += ["### Beside the paper", f"The paper's figures: {paper.source}.", grid(*_paper(results, paper))]
            parts += [line for line in [_agreement(results, paper)] if line]
    if results.sweeps:
        parts += [
            "## Learning rates",
            "Validation loss of the short trainings, nats a token; the lowest in bold is taken for the whole ones.",
            grid(*_sweeps(results)),
        ]
    bad = [record for each in results.found for record in each.others]
    bad += [record for records in results.sweeps.values() for record in records if record.status != "done"]
    if bad:
        parts += ["## Not done", *(f"- `{record.key}`: {record.status}: {record.reason}" for record in bad)]
    return "\n\n".join(parts) + "\n"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float, digits: int = 2) -> str:
    """A figure of a table; a dash for none."""
    if math.isnan(value):
        return EMPTY
    if math.isinf(value) or abs(value) >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{1 if abs(value) >= 100 else digits}f}"


def slug(text: str) -> str:
    """``Table 3`` as ``table-3``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "group"


def _legend(results: Results) -> str:
    lines = [
        "Perplexities are means over the seeds, in brackets the lowest and the highest where there are several; "
        "± is half of the 95% interval over the windows of text, which is the same text for all models; where its ends "
        "lie too far apart for that, they stand in square brackets. "
        "tokens/s: median over the steps of training, on one device; none of trainings that shared it with others."
    ]
    devices = sorted({record.device for each in results.found for record in each.finals if record.device})
    if devices:
        lines.append(f"Trained on: {', '.join(devices)}.")
    return " ".join(lines)


def _with(view: View) -> str:
    """What stands beside a difference."""
    if view.window is not None:
        return ""
    return ", with the 95% interval over the same windows of text (another seed is not in it)"


def _protocol(evaluation: Evaluation) -> str:
    bound = "" if evaluation.max_tokens is None else f" At most {evaluation.max_tokens:,} tokens at each length."
    return f"`{evaluation.protocol}`: {MEANING[evaluation.protocol]}{bound}"


def _runs(results: Results, models: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    head = ["model", "parameters", "learning rate", "seeds", "tokens", "loss at the end", "validation loss"]
    rows = []
    for each in models:
        if not each.finals:
            state = each.others[0].status if each.others else "not trained"
            rows.append([each.title, state, *[EMPTY] * 8])
            continue
        first = each.finals[0]
        source = f" ({each.run.lr_from}'s)" if each.run.lr_from else ""
        losses = [record.val_loss for record in each.finals if record.val_loss is not None]
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
        rows.append(
            [
                each.title,
                f"{first.parameters / 1e6:.2f}M",
                f"{first.lr:g}{source}",
                ", ".join(str(record.seed) for record in each.finals),
                count(first.tokens),
                number(each.mean("train_loss"), 4),
                number(each.mean("val_loss"), 4) + spread,
                _speed(each),
                _gib(each.mean("peak_memory")),
                number(each.mean("seconds"), 0),
            ]
        )
    return [*head, "tokens/s", "memory", "seconds in all"], rows


def _speed(model: Found) -> str:
    """Tokens a second of the trainings that had their device alone."""
    alone = [each.tokens_per_s for each in model.finals if each.tokens_per_s is not None and each.shared == 1]
    return count(sum(alone) / len(alone)) if alone else EMPTY


def _perplexities(models: Sequence[Found], view: View) -> tuple[list[str], list[list[str]]]:
    by_model = {each.title: each.cells(view) for each in models if each.finals}
    lengths = sorted({length for cells in by_model.values() for length in cells})
    best = {
        length: min((cells[length].perplexity for cells in by_model.values() if _measured(cells, length)), default=0.0)
        for length in lengths
    }
    rows = []
    for title, cells in by_model.items():
        row = [title]
        for length in lengths:
            if not _measured(cells, length):
                row.append(EMPTY)
                continue
            row.append(_cell(cells[length], cells[length].perplexity == best[length]))
        rows.append(row)
    return ["model", *(_span(view.evaluation, by_model.values(), length) for length in lengths)], rows


def _cell(cell: Cell, best: bool) -> str:
    low, high = cell.interval
    if math.isnan(low) or math.isinf(high):
        reach = ""
    elif high < EVEN * low:
        reach = f" ± {number((high - low) / 2)}"
    else:
        reach = f" [{number(low)}, {number(high)}]"
    seeds = "" if cell.seeds is None else f" ({number(cell.seeds[0])} to {number(cell.seeds[1])})"
    return (f"**{number(cell.perplexity)}**" if best else number(cell.perplexity)) + reach + seeds


def _span(evaluation: Evaluation, tables: Any, length: int) -> str:
    """A column's heading; where a bucket begins too."""
    cell = next(cells[length] for cells in tables if length in cells)
    return f"{short(cell.low) if cell.low else 0}-{short(length)}" if evaluation.protocol == "stream" else short(length)


def _measured(cells: dict[int, Cell], length: int) -> bool:
    return length in cells and bool(cells[length].losses)


def _differences(reference: Found, models: Sequence[Found], view: View) -> tuple[list[str], list[list[str]]]:
    ours = reference.cells(view)
    rows = []
    for each in models:
        if each.run.name == reference.run.name or not each.finals:
            continue
        cells = each.cells(view)
        row = [each.title]
        for length in ours:
            if not (_measured(cells, length) and _measured(ours, length)):
                row.append(EMPTY)
                continue
            found = difference(cells[length], ours[length])
            low, mean, high = (signed(percent(value)) for value in (found.low, found.mean, found.high))
            row.append(mean if math.isnan(found.low) else f"{mean} ({low} to {high})")
        rows.append(row)
    return ["model", *(_span(view.evaluation, [ours], length) for length in ours)], rows


def _unpaired(reference: Found, models: Sequence[Found], view: View) -> bool:
    """Whether a difference stands without its interval, though there are windows enough."""
    ours = reference.cells(view)
    pairs = [
        (cells[length], ours[length])
        for each in models
        if each.run.name != reference.run.name
        for cells in (each.cells(view),)
        for length in ours
        if _measured(cells, length) and _measured(ours, length)
    ]
    return any(min(a.windows, b.windows) > 1 and math.isnan(difference(a, b).low) for a, b in pairs)


def signed(value: float) -> str:
    """A difference in percent; a large one as a multiple."""
    if math.isnan(value):
        return EMPTY
    return f"{value:+.1f}" if value < 300 else f"x{number(1 + value / 100, 1)}"


def _paper(results: Results, paper: PaperTable) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, figures in paper.rows.items():
        ours = [number(value) for value in results.beside(paper, name)]
        rows.append([results.of(name).title, *map(str, figures), *ours])
    lengths = [f"ours {short(length)}" for length in paper.lengths]
    return ["model", *(f"paper {column}" for column in paper.columns), *lengths], rows


def _agreement(results: Results, paper: PaperTable) -> str:
    """How far the order of the models is the paper's."""
    words = []
    for i, length in enumerate(paper.lengths):
        column = len(paper.columns) - len(paper.lengths) + i
        pairs = [
            (float(row[column]), ours)
            for name, row in paper.rows.items()
            if isinstance(row[column], int | float) and not math.isnan(ours := results.beside(paper, name)[i])
        ]
        if len(pairs) > 2:
            found = rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
            words.append(f"{found:.2f} (paper {paper.columns[column]}, ours {short(length)}, {len(pairs)} models)")
    return f"Rank correlation (Spearman's) of ours with the paper's: {'; '.join(words)}." if words else ""


def _sweeps(results: Results) -> tuple[list[str], list[list[str]]]:
    rates = sorted({record.lr for records in results.sweeps.values() for record in records})
    rows = []
    for name, records in results.sweeps.items():
        losses = {record.lr: record.val_loss for record in records if record.status == "done"}
        best = min((loss for loss in losses.values() if loss is not None), default=math.nan)
        states = {record.lr: record.status for record in records}
        row = [results.of(name).title]
        for rate in rates:
            loss = losses.get(rate)
            text = states.get(rate, "") if loss is None else f"{loss:.4f}"
            row.append(f"**{text}**" if loss is not None and loss == best else text)
        rows.append(row)
    return ["model", *(f"{rate:g}" for rate in rates)], rows


def _gib(size: float) -> str:
    return EMPTY if math.isnan(size) else f"{size / 2**30:.1f} GiB"


def perplexity_rows(results: Results) -> Iterator[dict[str, object]]:
    """One for each run, seed, evaluation and length."""
    for each in results.found:
        for record in each.finals:
            for measured in record.evaluations:
                for row in measured.results:
                    fields = ("length", "windows", "tokens", "loss", "standard_error", "perplexity", "bits_per_byte")
                    yield {
                        "run": each.run.name,
                        "seed": record.seed,
                        "lr": record.lr,
                        "evaluation": measured.name,
                        **{field: row[field] for field in fields},
                        "note": row["note"],
                    }


def run_rows(results: Results) -> Iterator[dict[str, object]]:
    """One for each training, short ones too."""
    records = [record for each in results.sweeps.values() for record in each]
    records += [record for each in results.found for record in (*each.finals, *each.others)]
    fields = (
        *("run", "stage", "lr", "seed", "status", "reason", "parameters", "steps", "tokens", "train_loss", "val_loss"),
        *("tokens_per_s", "train_seconds", "seconds", "peak_memory", "device", "shared", "started", "finished"),
    )
    for record in records:
        yield {field: getattr(record, field) for field in fields}


def table_csv(rows: Iterator[dict[str, object]]) -> str:
    """Rows with a heading; what is None or not a number is left empty."""
    found = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(found[0]) if found else ["run"], lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({key: "" if value is None or value != value else value for key, value in row.items()})
    return text.getvalue()


def as_json(results: Results) -> dict[str, object]:
    """Everything the tables show, and what the trainings were made with."""
    return {
        "task": "study",
        "title": results.study.title,
        "reference": results.study.reference,
        "groups": {group: [each.run.name for each in results.group(group)] for group in results.groups},
        "evaluations": [each.model_dump(mode="json") for each in results.study.evaluations],
        "runs": [_run_json(results, each) for each in results.found],
        "sweeps": {
            name: [{"lr": r.lr, "status": r.status, "val_loss": r.val_loss} for r in records]
            for name, records in results.sweeps.items()
        },
        "paper": [table.model_dump(mode="json") for table in results.study.paper],
    }


def _run_json(results: Results, each: Found) -> dict[str, object]:
    perplexities = {}
    for evaluation in results.study.evaluations:
        perplexities[evaluation.name] = [
            {
                **{key: value for key, value in asdict(cell).items() if key not in ("means", "sizes", "errors", "low")},
                "from": cell.low,
                "loss": cell.loss,
                "perplexity": cell.perplexity,
                "low": cell.interval[0],
                "high": cell.interval[1],
                "seeds": cell.seeds,
            }
            for cell in each.cells(View(evaluation)).values()
        ]
    return {
        "name": each.run.name,
        "title": each.title,
        "groups": each.run.groups,
        "trainings": [_training_json(record) for record in (*each.finals, *each.others)],
        "perplexity": perplexities,
    }


def _training_json(record: Record) -> dict[str, object]:
    return record.model_dump(mode="json", exclude={"evaluations", "run", "format"})


def readme_text(results: Results, out: Path, figures: Sequence[tuple[str, str]], before: str | None) -> str | None:
    """The README with the part between the marks renewed; None to leave a README without marks alone."""
    study = shlex.quote(str(results.folder))
    made = shlex.join(results.command) or f"samba-lm study STUDY --out {study}"
    lines = [
        BEGIN,
        "Made by",
        f"```\n{made}\nsamba-lm study table {study} --out {shlex.quote(str(out))}\n```",
        "[tables.md](tables.md) has all tables; [perplexity.csv](perplexity.csv), [runs.csv](runs.csv) and "
        "[results.json](results.json) the same figures to compute with, with every training's recipe, loss curve, "
        "device and versions.",
        *(f"**{title}**\n\n![{title}]({name})" for name, title in figures),
        END,
    ]
    part = "\n\n".join(lines)
    if before is None:
        rest = "## What agrees with the paper, and what does not\n\nTo be written by those who looked at the figures."
        return f"# {results.study.title}\n\n{part}\n\n{rest}\n"
    if BEGIN not in before or END not in before:
        return None
    head, tail = before[: before.index(BEGIN)], before[before.index(END) + len(END) :]
    return head + part + tail
