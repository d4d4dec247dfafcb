"""Drawing entropies by block, as the paper's Appendix E does: attention and selection apart, a curve for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_lm.eval.entropy import Block, Kind
from samba_lm.figures import FAINT, Axis, Curve, plot, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: dict[Kind, tuple[str, str]] = {
    "attention": ("Attention", "no layer of these attends"),
    "selection": ("Selection of Mamba (S6)", "no layer of these selects"),
}
COLUMNS = 3
"""Of the legend."""


def write_figure(path: Path, found: Mapping[str, Sequence[Block]]) -> None:
    """Write the figure ``path``, atomically; ``found`` are the blocks of each model, by the name to show."""
    import matplotlib

    matplotlib.use("Agg")
    save_figure(path, draw(found))


def draw(found: Mapping[str, Sequence[Block]]) -> Figure:
    """Two panels over the block's number, with 95% intervals. A model keeps its colour in both."""
    from matplotlib.figure import Figure

    rows = -(-len(found) // COLUMNS)
    figure = Figure(figsize=(9.2, 3.9 + 0.2 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    samples = max((block.samples for blocks in found.values() for block in blocks), default=0)
    figure.suptitle(f"Entropy by block: means over {samples} texts, bars: 95% intervals", fontsize=10)
    shown: dict[str, Any] = {}
    for axes, (kind, (title, nothing)) in zip(panels, PANELS.items(), strict=True):
        curves = [_curve(name, i, blocks, kind) for i, (name, blocks) in enumerate(found.items())]
        last = max((int(number) for curve in curves for number in curve.x), default=0)
        step = -(-(last + 1) // 12)
        plot(
            axes,
            [curve for curve in curves if curve.x],
            Axis("block", ticks=range(0, last + 1, step), limits=(-0.4, last + 0.4)),
            Axis("entropy (nats)"),
        )
        axes.set_title(title, fontsize=10)
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if not any(curve.x for curve in curves):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.text(0.5, 0.5, nothing, transform=axes.transAxes, ha="center", color=FAINT, fontsize=9)
    if shown:
        names = [name for name in found if name in shown]
        style: dict[str, Any] = {"ncols": min(COLUMNS, len(names)), "frameon": False, "fontsize": 8.5}
        figure.legend([shown[name] for name in names], names, loc="outside lower center", **style)
    return figure


def _curve(name: str, style: int, blocks: Sequence[Block], kind: Kind) -> Curve:
    here = [block for block in blocks if block.kind == kind]
    return Curve(
        name,
        [block.block for block in here],
        [block.nats for block in here],
        [block.low for block in here],
        [block.high for block in here],
        style,
    )
