"""Passkeys as heat maps, phonebooks as curves, both as tables of what was right at each size."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from samba_lm.eval.intervals import wilson
from samba_lm.eval.recall_figure import Spot, heat_map, phonebook_curves, tally
from samba_lm.eval.recall_steps import by_run, lines, step_curves
from samba_lm.figures import short
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.models import TOLD_WHOLE, printable
from samba_lm.report.page import curves_figure, grid, named, note, paragraph, with_note
from samba_lm.report.part import Entry, Group, Task, interval, percent, skipped, whole
from samba_lm.report.svg import inline


@dataclass(frozen=True)
class Recall:
    """What one model found again: by size and depth, what the control got right, and what was skipped, with reasons."""

    spots: dict[tuple[int, float | None], Spot]
    control_right: int
    skips: dict[int, str]

    @property
    def sizes(self) -> list[int]:
        return sorted({size for size, _ in self.spots})

    def at(self, size: int) -> Spot:
        """All depths of a size together."""
        here = [spot for (other, _), spot in self.spots.items() if other == size]
        return Spot(sum(spot.right for spot in here), sum(spot.total for spot in here))


def read(entry: dict[str, Any]) -> Recall:
    """A model's entry of a file of ``eval passkey`` or ``eval phonebook``."""
    cells = entry["cells"]
    spots = {}
    for cell in cells:
        depth = None if cell["depth"] is None else float(cell["depth"])
        right, total = whole(cell["right"]), whole(cell["total"])
        if right > total or not 0 <= (depth or 0) <= 1:
            raise ValueError(f"{right} of {total} at depth {depth} is no result")
        spots[whole(cell["size"], 1), depth] = Spot(right, total)
    skips = {whole(cell["size"]): str(cell["skipped"]) for cell in cells if cell["skipped"]}
    return Recall(spots, sum(whole(cell["control_right"] or 0) for cell in cells), skips)


def _render_maps(group: Group[Recall]) -> Html:
    sizes = sorted({size for entry in group.entries for size in entry.figures.sizes})
    depths = sorted({depth for entry in group.entries for _, depth in entry.figures.spots if depth is not None})
    maps = []
    over, shown = _over_steps(group, "tokens")
    alone = [entry for entry in group.entries if entry.model.label not in shown]
    for i, entry in enumerate(alone if sizes and depths else ()):
        told = tally(entry.figures.spots)
        words = f"{entry.model.label}: right answers by the length of the text and the depth of the key, {told}"
        plot = inline(heat_map(sizes, depths, entry.figures.spots), f"{group.anchor}-{i}", words, "map")
        maps.append(tag("figure", tag("figcaption", tag("b", entry.model.label), f": {told}"), plot))
    scale = tag("p", "0%", tag("span"), "100% right; a cross: skipped; an empty cell: not measured", class_="scale")
    drawn = [scale, tag("div", *maps, class_="maps")] if alone else []
    return join([over, *drawn, _table(group, "tokens", shown)])


def _render_curves(group: Group[Recall]) -> Html:
    found = {entry.model.label: entry.figures.spots for entry in group.entries}
    figure = curves_figure(
        lambda size: phonebook_curves(found, styles=group.styles, size=size, legend=False),
        group.anchor,
        "Right answers by the entries of the phonebook. Bars: 95% intervals.",
        group.names,
    )
    return join([_over_steps(group, "entries")[0], figure, _table(group, "entries", set())])


def _over_steps(group: Group[Recall], unit: str) -> tuple[Html, set[str]]:
    """A figure of the runs of which there are several steps, and the labels of these models."""
    found: dict[str, dict[str, Entry[Recall]]] = {}  # the same weights may have been measured in several dtypes
    for entry in group.entries:
        used = [str(entry.facts[fact]) for fact in TOLD_WHOLE if entry.facts.get(fact)]
        used += [str(entry.facts["adapter_sha256"])[:8]] if entry.facts.get("adapter_sha256") else []
        found.setdefault(printable(" ".join(used)), {})[printable(str(entry.facts.get("checkpoint")))] = entry
    runs = {
        f"{run} {used}".strip() if len(found) > 1 else run: steps
        for used, entries in found.items()
        for run, steps in by_run(entries).items()
        if any(spot.total for entry in steps.values() for spot in entry.figures.spots.values())
    }
    spots = {run: {step: entry.figures.spots for step, entry in steps.items()} for run, steps in runs.items()}
    names = [(name, style) for style, name in enumerate(lines(spots, unit))]
    if not names:
        return join([]), set()
    figure = curves_figure(
        lambda size: step_curves(spots, unit, size=size, legend=False),
        f"{group.anchor}-steps",
        "Right answers by the step of the training. Bars: 95% intervals.",
        names,
    )
    return figure, {entry.model.label for steps in runs.values() for entry in steps.values()}


def _table(group: Group[Recall], unit: str, unmarked: Collection[str]) -> Html:
    """``unmarked``: models without a line of their own in the figure."""
    sizes = sorted({size for entry in group.entries for size in entry.figures.sizes})
    names = [
        named(entry.model.label, None if entry.model.label in unmarked else entry.model.style)
        for entry in group.entries
    ]
    cells = [[_cell(entry.figures, size) for size in sizes] for entry in group.entries]
    parts = [grid(unit, list(map(short, sizes)), names, cells)]
    parts.append(note("Small: right answers of all, and the share's 95% interval (Wilson)."))
    if group.settings.get("control"):
        wrong = [entry.model.label for entry in group.entries if entry.figures.control_right]
        told = f"right all the same for {', '.join(wrong)}: these figures say nothing" if wrong else "never right"
        parts.append(paragraph(f"Control, asked with the state set to zero: {told}."))
    parts.append(skipped(_reasons(group)))
    return join(parts)


def _cell(found: Recall, size: int) -> Html:
    spot = found.at(size)
    if not spot.total:
        return with_note("-", "skipped" if size in found.skips else "")
    low, high = wilson(spot.right, spot.total)
    ends = interval(low, high, 0, 100)
    return with_note(percent(spot.right / spot.total, 0), join([f"{spot.right}/{spot.total}", tag("br"), ends]))


def _reasons(group: Group[Recall]) -> Sequence[tuple[str, str]]:
    found: dict[tuple[str, str], list[int]] = {}
    for entry in group.entries:
        for size, why in entry.figures.skips.items():
            found.setdefault((entry.model.label, why), []).append(size)
    return [(f"{label} at {', '.join(map(short, sizes))}", why) for (label, why), sizes in found.items()]


def _heading(group: Group[Recall]) -> str:
    trials = group.settings.get("trials")
    words = [f"{trials} text{'s' * (trials != 1)} in each cell"] if isinstance(trials, int) else []
    if group.settings.get("filler_sha256"):
        words.append("a book as filler")
    return ", ".join(words)


PASSKEY = Task(
    "passkey",
    "Passkey",
    "A five-digit key is hidden in a long text at a depth of it, and asked for at the end.",
    read,
    _heading,
    _render_maps,
    items="cells",
    told_by=("size", "depth"),
)
PHONEBOOK = Task(
    "phonebook",
    "Phonebook",
    "A phonebook is read, then the number of one of its names is asked for.",
    read,
    _heading,
    _render_curves,
    items="cells",
    told_by=("size", "depth"),
)
