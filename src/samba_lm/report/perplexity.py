"""Perplexity against context length; bits a byte where the models do not share a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from samba_lm.figures import Axis, Curve, draw_curves, short
from samba_lm.report.markup import Html, join
from samba_lm.report.page import curves_figure, grid, named, note, paragraph, with_note
from samba_lm.report.part import Group, Task, interval, number, real, skipped, whole


@dataclass(frozen=True)
class Figure:
    """A figure with the ends of its 95% interval; NaN for what is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AtLength:
    """What was measured of a model at a length, or why nothing was."""

    perplexity: Figure
    bits: Figure
    tokens: int
    skipped: str


Lengths = dict[int, AtLength]


def read(entry: dict[str, Any]) -> Lengths:
    """A model's entry of a file of ``eval perplexity``."""
    found = {}
    for row in entry["results"]:
        perplexity = Figure(*(real(row[name]) for name in ("perplexity", "low", "high")))
        bits = Figure(*(real(row[name]) for name in ("bits_per_byte", "bits_low", "bits_high")))
        note = str(row["skipped"] or row["note"])
        found[whole(row["length"], 1)] = AtLength(perplexity, bits, whole(row["tokens"]), note)
    return found


def _render(group: Group[Lengths]) -> Html:
    tokenizers = {str(entry.facts.get("tokenizer")) for entry in group.entries}
    if len(tokenizers) == 1:
        return join([_curves(group, "perplexity"), _table(group, "perplexity"), skipped(_reasons(group))])
    warning = paragraph(
        "These models have different tokenizers, so that a token is not the same for all and their perplexities do not "
        "compare: bits a byte do."
    )
    return join([warning, _curves(group, "bits"), _table(group, "bits"), skipped(_reasons(group))])


def _curves(group: Group[Lengths], which: str) -> Html:
    curves = [_curve(entry.model.label, entry.model.style, entry.figures, which) for entry in group.entries]
    stream = group.settings.get("protocol") == "stream"
    x = Axis("place in the document, up to" if stream else "context length, tokens", "log2")
    y = Axis("perplexity", "log10") if which == "perplexity" else Axis("bits a byte")
    words = "Perplexity" if which == "perplexity" else "Bits a byte"
    marks = _trained(group)
    caption = f"{words} by {'the place in the document' if stream else 'the context length'}: lower is better."
    caption += " Bars: 95% intervals." + (" Dotted: the length trained on." if marks else "")
    return curves_figure(
        lambda size: draw_curves(curves, x, y, size=size, legend=False, marks=marks), group.anchor, caption, group.names
    )


def _curve(label: str, style: int, lengths: Lengths, which: str) -> Curve:
    points = [(length, getattr(at, which)) for length, at in sorted(lengths.items())]
    known = [(length, figure) for length, figure in points if math.isfinite(figure.value)]
    return Curve(
        label,
        [length for length, _ in known],
        [figure.value for _, figure in known],
        [figure.low for _, figure in known],
        [figure.high for _, figure in known],
        style,
    )


def _trained(group: Group[Lengths]) -> list[tuple[float, str]]:
    """The lengths that the models were trained on, where the file tells and the figure reaches them."""
    known = {entry.facts.get("trained_length") for entry in group.entries}
    measured = [length for entry in group.entries for length, at in entry.figures.items() if not at.skipped]
    low, high = min(measured, default=0), max(measured, default=0)
    return [(float(length), "trained") for length in known if isinstance(length, int) and low <= length <= high]


def _table(group: Group[Lengths], which: str) -> Html:
    lengths = sorted({length for entry in group.entries for length in entry.figures})
    digits = 2 if which == "perplexity" else 4
    best = {
        length: min(
            (figure.value for entry in group.entries if (figure := _at(entry.figures, length, which)) is not None),
            default=math.nan,
        )
        for length in lengths
    }

    def cell(found: Lengths, length: int) -> Html:
        figure = _at(found, length, which)
        if figure is None:
            return with_note("-", "skipped" if length in found and found[length].skipped else "")
        ends = interval(figure.low, figure.high, digits)
        return with_note(
            number(figure.value, digits), ends, best=len(group.entries) > 1 and figure.value == best[length]
        )

    names = [named(entry.model.label, entry.model.style) for entry in group.entries]
    cells = [[cell(entry.figures, length) for length in lengths] for entry in group.entries]
    words = "Small: the 95% interval over the windows of the text. Bold: the lowest."
    return join([grid("tokens", list(map(short, lengths)), names, cells), note(words)])


def _at(found: Lengths, length: int, which: str) -> Figure | None:
    figure: Figure | None = getattr(found[length], which) if length in found else None
    return None if figure is None or math.isnan(figure.value) else figure


def _reasons(group: Group[Lengths]) -> Sequence[tuple[str, str]]:
    found: dict[tuple[str, str], list[int]] = {}
    for entry in group.entries:
        for length, at in sorted(entry.figures.items()):
            if at.skipped:
                found.setdefault((entry.model.label, at.skipped), []).append(length)
    return [(f"{label} at {', '.join(map(short, lengths))}", why) for (label, why), lengths in found.items()]


def _heading(group: Group[Lengths]) -> str:
    data = group.record.get("data")
    paths = data.get("paths") if isinstance(data, dict) else None
    names = [PurePath(str(path)).name for path in paths] if isinstance(paths, list) else []
    what = f" on {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
    return f"Protocol {group.settings.get('protocol', '?')}{what}"


PERPLEXITY = Task(
    "perplexity",
    "Perplexity",
    "How well the next token of held-out text is foretold, by how much of the text has been read. Figures of different "
    "protocols or texts never stand in one table.",
    read,
    _heading,
    _render,
    items="results",
    told_by=("length",),
)
