"""The tour's page: one HTML file that needs nothing else, its figures also as PNG."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from samba_lm import shipped
from samba_lm.data.passkey import KEY_LINE, QUESTION
from samba_lm.demo.tour import TourResult, shown, verdict
from samba_lm.figures import WIDE, Axis, Curve, draw_curves, save_figure, short
from samba_lm.files import write_text
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.page import command, curves_figure, facts, how, page, paragraph, section, table
from samba_lm.report.part import environment, interval, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 8
"""Windows from which on an interval is drawn."""


def write_page(result: TourResult, provenance: dict[str, object], out: Path) -> Path:
    """Write report.html, perplexity.png and memory.png into ``out``; returns the page's path."""
    save_figure(out / "perplexity.png", _draw_curve(result, WIDE))
    save_figure(out / "memory.png", _draw_memory(result, WIDE))
    path = out / "report.html"
    write_text(path, _page(result, provenance))
    return path


def record(result: TourResult) -> dict[str, object]:
    """The figures as plain data."""
    plain = dataclasses.asdict(result)
    plain["recall"] = {
        "document_tokens": result.reading.length,
        "depth": result.depth,
        "filler": result.filler,
        "tokens_per_s": result.reading.tokens_per_s,
        "skipped": "" if result.cell is None else result.cell.skipped,
        "trial": None if result.trial is None else dataclasses.asdict(result.trial),
    }
    plain["perplexity"] = [
        {"length": r.length, "windows": r.windows, "perplexity": r.perplexity, "low": r.interval[0],
         "high": r.interval[1], "bits_per_byte": r.bits_per_byte}
        for r in result.results
    ]  # fmt: skip
    for name in ("cell", "results"):
        del plain[name]
    return {"task": "demo", **plain}


def _page(result: TourResult, provenance: dict[str, object]) -> str:
    state = f"{result.state_bytes / 1e6:.2f} MB" + ("" if result.constant_state else ", growing with the text")
    opening = paragraph(
        f"{result.model}: {result.parameters / 1e6:.2f} million parameters, run on this machine's processor. What it "
        f"remembers of a text, however long, is a state of {state}."
        if result.constant_state
        else f"{result.model}: {result.parameters / 1e6:.2f} million parameters; its state takes {state}."
    )
    return page(
        "samba-lm demo", opening, _written(result), _recall(result), _perplexity(result), _made(result, provenance)
    )


def _written(result: TourResult) -> Html:
    told = tag("pre", tag("span", result.prompt, class_="prompt"), result.written)
    base = "It is a base model, taught by books to continue texts: it does not converse, and what it says is made up."
    speed = paragraph(
        f"After the grey words, {result.new_tokens} tokens at {result.decode_tokens_per_s:,.0f} a second. ",
        base if result.model == shipped.DEFAULT else "",
    )
    return section("What it writes", told, speed)


def _recall(result: TourResult) -> Html:
    reading, trial = result.reading, result.trial
    title = "A number in a long document"
    if trial is None or not reading.tokens:
        why = "" if result.cell is None else result.cell.skipped
        return section(title, paragraph(f"The document was not read: {why}."))
    hidden = paragraph(
        f"In a document of {reading.length:,} tokens ({result.filler}), after {result.depth:.0%} of it, stood ",
        tag("q", KEY_LINE.format(key=trial.answer).strip()),
        " with a number drawn from the system's randomness a moment before. It was read once, at "
        f"{reading.tokens_per_s:,.0f} tokens a second, in {reading.seconds[-1]:.1f} seconds. Then came the question: ",
        tag("q", f"{QUESTION} ..."),
        " The same question, asked once more with all that it remembers set to zero, is the control: it must fail.",
    )
    rows = [
        ["asked", shown(trial.written), "right" if trial.right else "wrong"],
        [
            "memory emptied",
            shown(trial.control or ""),
            "right, so something leaks" if trial.control_right else "wrong, as it should be",
        ],
    ]
    answers = table(["", "answer", f"the key: {trial.answer}"], rows, texts=(1, 2))
    figure = curves_figure(
        lambda size: _draw_memory(result, size), "memory", "Memory of the whole process while it read.",
        [("resident memory", 0)],
    )  # fmt: skip
    return section(title, hidden, answers, figure)


def _draw_memory(result: TourResult, size: tuple[float, float]) -> Figure:
    reading = result.reading
    held = [value / 2**20 for value in reading.resident]
    thousands = [tokens / 1000 for tokens in reading.tokens]  # short numbers have room on a telephone
    curve = Curve("resident memory", thousands, held, style=0)
    top = max(held, default=1.0)
    return draw_curves(
        [curve], Axis("tokens read, thousands"), Axis("MiB", limits=(0.0, 1.2 * top)), size=size, legend=False
    )


def _perplexity(result: TourResult) -> Html:
    about = paragraph(
        f"{result.source}, cut into windows of each length; every window is read from a fresh state and all its "
        "predictions count. Lower is better."
    )
    rows = [
        [
            f"{r.length:,}",
            r.windows,
            number(r.perplexity),
            interval(*r.interval),
            "-" if r.bits_per_byte is None else number(r.bits_per_byte, 3),
        ]
        for r in result.results
    ]
    figures = table(["context, tokens", "windows", "perplexity", "95%", "bits a byte"], rows)
    caption = f"Perplexity by the context length. Bars: 95% intervals of {MANY} windows or more."
    drawn = curves_figure(lambda size: _draw_curve(result, size), "curve", caption, [(result.model, 0)])
    return section("Perplexity against context", about, paragraph(verdict(result).capitalize(), "."), drawn, figures)


def _draw_curve(result: TourResult, size: tuple[float, float]) -> Figure:
    known = result.results
    # Of a few windows an interval says nothing, and hides the curve.
    ends = [r.interval if r.windows >= MANY else (math.nan, math.nan) for r in known]
    lengths = [float(r.length) for r in known]
    curve = Curve(
        result.model,
        lengths,
        [r.perplexity for r in known],
        [low for low, _ in ends],
        [high for _, high in ends],
        style=0,
    )
    x = Axis("context length, tokens", "log2", ticks=lengths)
    return draw_curves([curve], x, Axis("perplexity", "log10"), size=size, legend=False)


def _made(result: TourResult, provenance: dict[str, object]) -> Html:
    times = facts([(f"seconds, {stage}", f"{seconds:.0f}") for stage, seconds in result.stages.items()])
    longest = f"Documents have {short(result.reading.length)} tokens so that all fits into {result.planned:.0f} s here."
    shown = command(provenance.get("command"))
    lines = [*([] if shown is None else [shown]), longest, times, facts(environment("", provenance))]
    return section("How this was made", how([join([line]) for line in lines]))
