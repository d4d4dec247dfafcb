"""Drawing what was found again: a passkey's heat map of length and depth, a phonebook's curve."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samba_lm.eval.recall import Cell, Count, Plan
from samba_lm.files import atomic_file

COLOURS = ("#c2410c", "#0f766e", "#7c3aed", "#1d4ed8", "0.45", "#a16207", "#be185d", "#15803d")
MARKERS = "os^Dv<>p"


def write_figure(path: Path, plan: Plan, found: Mapping[str, Sequence[Cell]]) -> None:
    """Write the PNG file ``path``, atomically; ``found`` are the cells of each model, by the name to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    if plan.depths == (None,):
        figure = Figure(figsize=(7.5, 4.4), dpi=150, layout="constrained")
        _curves(figure.subplots(), plan, found)
    else:
        wide = max(2.4, 0.55 * len(plan.sizes) + 1.2)
        columns = min(len(found), 3)
        rows = -(-len(found) // columns)
        high = max(2.2, 0.24 * len(plan.depths) + 1.2)
        figure = Figure(figsize=(wide * columns + 1.4, high * rows), dpi=150, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for spare in axes[len(found) :]:
            spare.set_axis_off()
        for one, (name, cells) in zip(axes, found.items(), strict=False):
            image = _heat_map(one, plan, name, cells)
        bar = figure.colorbar(image, ax=list(axes), fraction=0.05, pad=0.02)
        bar.set_label("right answers")
        bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_file(path) as tmp:
        tmp.write_bytes(buffer.getvalue())


def _heat_map(axes: Any, plan: Plan, name: str, cells: Sequence[Cell]) -> Any:
    """Depth downwards, length to the right; grey where nothing was measured, with a cross where it was skipped."""
    grid = np.full((len(plan.depths), len(plan.sizes)), np.nan)
    for cell in cells:
        if cell.key in plan.cells:
            row, column = plan.depths.index(cell.depth), plan.sizes.index(cell.size)
            grid[row, column] = Count.of([cell]).accuracy
            if cell.skipped:
                axes.text(column, row, "x", ha="center", va="center", color="0.45", fontsize=7)
    axes.set_facecolor("0.88")
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(plan.sizes)), [short(size) for size in plan.sizes], fontsize=8)
    axes.set_yticks(range(len(plan.depths)), [f"{depth:.0%}" for depth in plan.depths if depth is not None], fontsize=8)
    # A line between any two cells, so that a map of one colour can be read too.
    axes.set_xticks(np.arange(len(plan.sizes) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(plan.depths) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("tokens of the text", fontsize=9)
    axes.set_ylabel("depth of the key", fontsize=9)
    count = Count.of(cells)
    axes.set_title(f"{name}\n{count.right} of {count.total} right" if count.total else name, fontsize=9)
    return image


def _curves(axes: Any, plan: Plan, found: Mapping[str, Sequence[Cell]]) -> None:
    """Accuracy by size, with 95% intervals."""
    for i, (name, cells) in enumerate(found.items()):
        measured = sorted((cell for cell in cells if cell.trials), key=lambda cell: cell.size)
        counts = [Count.of([cell]) for cell in measured]
        shares = np.array([count.accuracy for count in counts])
        ends = np.array([count.interval for count in counts]).reshape(-1, 2)
        errors = np.abs(np.stack((shares - ends[:, 0], ends[:, 1] - shares))) if measured else None
        axes.errorbar(
            [cell.size for cell in measured],
            100 * shares,
            yerr=None if errors is None else 100 * errors,
            label=name,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=1.3,
            capsize=2,
            elinewidth=0.8,
        )
    axes.set_ylim(-3, 103)
    axes.set_xlabel("entries of the phonebook")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{plan.trials} books of each size, bars: 95% intervals", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def short(size: int) -> str:
    """4096 as "4K"."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return f"{size:,}"
