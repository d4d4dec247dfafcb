"""Drawing what was found again: a passkey's heat map of length and depth, a phonebook's curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samba_lm.eval.intervals import wilson
from samba_lm.figures import WIDE, Axis, Curve, as_text, draw_curves, save_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from samba_lm.eval.recall import Cell, Plan


@dataclass(frozen=True)
class Spot:
    """A cell as it is drawn: ``right`` answers of ``total``; none at all where it was skipped."""

    right: int
    total: int


Spots = Mapping[tuple[int, float | None], Spot]
"""By size and depth; what is missing was not measured."""


def spots_of(cells: Sequence[Cell]) -> Spots:
    """Cells as they are drawn."""
    return {cell.key: Spot(sum(trial.right for trial in cell.trials), len(cell.trials)) for cell in cells}


def write_figure(path: Path, plan: Plan, found: Mapping[str, Sequence[Cell]]) -> None:
    """Write the figure ``path``, atomically; ``found`` are the plan's cells of each model, by the name to show."""
    spots = {name: spots_of(cells) for name, cells in found.items()}
    if plan.depths == (None,):
        title = f"{plan.trials} books of each size, bars: 95% intervals"
        figure = phonebook_curves(spots, title=title)
    else:
        figure = heat_maps(plan.sizes, [depth for depth in plan.depths if depth is not None], spots)
    save_figure(path, figure)


def heat_maps(sizes: Sequence[int], depths: Sequence[float], found: Mapping[str, Spots]) -> Figure:
    """One map for each model, by its name, with a scale beside them all."""
    from matplotlib.figure import Figure

    wide = max(2.4, 0.55 * len(sizes) + 1.2)
    columns = max(1, min(len(found), 3))
    rows = -(-len(found) // columns)
    high = max(2.2, 0.24 * len(depths) + 1.2)
    figure = Figure(figsize=(wide * columns + 1.4, high * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in axes[len(found) :]:
        spare.set_axis_off()
    mesh: Any = None
    for one, (name, spots) in zip(axes, found.items(), strict=False):
        mesh = _heat_map(one, sizes, depths, spots)
        one.set_title(f"{as_text(name)}\n{tally(spots)}", fontsize=9)
    bar = figure.colorbar(mesh, ax=list(axes), fraction=0.05, pad=0.02)
    bar.set_label("right answers", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)
    return figure


def heat_map(sizes: Sequence[int], depths: Sequence[float], spots: Spots) -> Figure:
    """One model's map alone, as small as it can be read."""
    from matplotlib.figure import Figure

    size = (max(1.6, 0.34 * len(sizes)) + 0.75, max(1.0, 0.2 * len(depths)) + 0.55)
    figure = Figure(figsize=size, layout="constrained")
    _heat_map(figure.subplots(), sizes, depths, spots)
    return figure


def tally(spots: Spots) -> str:
    """How many answers of how many were right, in words."""
    total = sum(spot.total for spot in spots.values())
    return f"{sum(spot.right for spot in spots.values())} of {total} right" if total else "not measured"


def phonebook_curves(
    found: Mapping[str, Spots],
    *,
    styles: Mapping[str, int] | None = None,
    size: tuple[float, float] = WIDE,
    legend: bool = True,
    title: str = "",
) -> Figure:
    """The share of right answers by the entries of the book, with 95% intervals. ``styles``: places in the palette."""
    points = {
        name: sorted((size, spot.right, spot.total) for (size, _), spot in spots.items() if spot.total)
        for name, spots in found.items()
    }
    return share_curves(points, Axis("entries of the phonebook"), styles=styles, size=size, legend=legend, title=title)


def share_curves(
    found: Mapping[str, Sequence[tuple[int, int, int]]],
    x: Axis,
    *,
    styles: Mapping[str, int] | None = None,
    size: tuple[float, float] = WIDE,
    legend: bool = True,
    title: str = "",
) -> Figure:
    """Shares of right answers with 95% intervals: for each curve's name where a point stands, right answers and all."""
    curves = []
    for i, (name, points) in enumerate(found.items()):
        ends = [wilson(right, total) for _, right, total in points]
        curves.append(
            Curve(
                name,
                x=[where for where, _, _ in points],
                y=[100 * right / total for _, right, total in points],
                low=[100 * low for low, _ in ends],
                high=[100 * high for _, high in ends],
                style=i if styles is None else styles[name],
            )
        )
    right = Axis("right answers, %", limits=(-3, 103))
    figure = draw_curves(curves, x, right, size=size, legend=legend)
    if title:
        figure.axes[0].set_title(title, fontsize=10)
    return figure


def _heat_map(axes: Any, sizes: Sequence[int], depths: Sequence[float], spots: Spots) -> Any:
    """Depth downwards, length to the right; grey where nothing was measured, with a cross where it was skipped."""
    grid = np.full((len(depths), len(sizes)), np.nan)
    for row, column in np.ndindex(grid.shape):
        spot = spots.get((sizes[column], depths[row]))
        if spot is None:
            continue
        if spot.total:
            grid[row, column] = spot.right / spot.total
        else:
            axes.text(column, row, "x", ha="center", va="center", color="#737373", fontsize=7)
    axes.set_facecolor("#e0e0e0")
    # Squares with a line between any two, not an image: sharp at any size, and a map of one colour can be read too.
    mesh = axes.pcolormesh(
        np.arange(len(sizes) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5, grid,
        vmin=0, vmax=1, cmap="viridis", edgecolors="#ffffff", linewidth=1,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xticks(range(len(sizes)), [short(size) for size in sizes], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("tokens of the text", fontsize=9)
    axes.set_ylabel("depth of the key", fontsize=9)
    return mesh
