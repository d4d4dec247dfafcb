"""How widely models look: entropies of attention and of Mamba's selection, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from samba_lm.figures import Axis, Curve, draw_curves
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.page import curves_figure, grid, named, note, with_note
from samba_lm.report.part import Group, Task, interval, number, real, whole

KINDS = {"attention": "Attention", "selection": "Selection of Mamba (S6)"}


@dataclass(frozen=True)
class Block:
    """A block's entropy in nats, its 95% interval, its share of the largest possible; the texts it was measured on."""

    nats: float
    low: float
    high: float
    share: float
    samples: int


Blocks = dict[str, dict[int, Block]]
"""By kind and number."""


def read(entry: dict[str, Any]) -> Blocks:
    """A model's entry of a file of ``eval entropy``."""
    found: Blocks = {kind: {} for kind in KINDS}
    for row in entry["blocks"]:
        nats, low, high, share = (real(row[name]) for name in ("nats", "low", "high", "share"))
        found[row["kind"]][whole(row["block"])] = Block(nats, low, high, share, whole(row["samples"]))
    return found


def _render(group: Group[Blocks]) -> Html:
    parts = [_kind(group, kind, title) for kind, title in KINDS.items()]
    small = note("Nats. Small: the 95% interval over the texts, and the share of the largest entropy possible.")
    return join([*parts, small])


def _kind(group: Group[Blocks], kind: str, title: str) -> Html:
    mine = [entry for entry in group.entries if entry.figures[kind]]
    if not mine:
        return Html("")
    numbers = sorted({block for entry in mine for block in entry.figures[kind]})
    curves = [_curve(entry.model.label, entry.model.style, entry.figures[kind]) for entry in mine]
    x = Axis("block", ticks=numbers[:: -(-len(numbers) // 12)])
    caption = f"{title}: entropy by block. Bars: 95% intervals."
    figure = curves_figure(
        lambda size: draw_curves(curves, x, Axis("entropy, nats"), size=size, legend=False),
        f"{group.anchor}-{kind}",
        caption,
        [(entry.model.label, entry.model.style) for entry in mine],
    )
    names = [named(entry.model.label, entry.model.style) for entry in mine]
    cells = [[_cell(entry.figures[kind].get(block)) for block in numbers] for entry in mine]
    return join([tag("h4", title), figure, grid("block", numbers, names, cells)])


def _curve(label: str, style: int, blocks: dict[int, Block]) -> Curve:
    found = sorted(blocks.items())
    return Curve(
        label,
        [number for number, _ in found],
        [block.nats for _, block in found],
        [block.low for _, block in found],
        [block.high for _, block in found],
        style,
    )


def _cell(block: Block | None) -> object:
    if block is None:
        return ""
    share = f"{100 * block.share:.0f}%" if math.isfinite(block.share) else ""
    return with_note(number(block.nats, 3), join([interval(block.low, block.high, 3), tag("br"), share]))


def _heading(group: Group[Blocks]) -> str:
    samples = {block.samples for entry in group.entries for kind in entry.figures.values() for block in kind.values()}
    return f"{'-'.join(map(str, sorted({min(samples), max(samples)})))} texts" if samples else ""


ENTROPY = Task(
    "entropy",
    "Entropy",
    "How widely attention and Mamba's selection spread over a text: low where a few places decide, high where all do.",
    read,
    _heading,
    _render,
)
