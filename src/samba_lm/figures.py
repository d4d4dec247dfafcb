"""Figures of curves in one style: colours that are told apart, error bars, and axes of lengths; drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from samba_lm.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["linear", "log2", "log10"]

PALETTE = (
    ("#c2410c", "#fb8b4b"),
    ("#1d4ed8", "#7fa9ff"),
    ("#0f766e", "#3fcfbd"),
    ("#7e22ce", "#c894f7"),
    ("#a16207", "#e6b73e"),
    ("#be185d", "#f781b3"),
    ("#4d7c0f", "#a5d75d"),
    ("#0369a1", "#6cc5f5"),
    ("#57534e", "#b8b2aa"),
)
"""Of curves: on a light ground, and the same on a dark one. Markers and dashes tell apart what colours do not."""
MARKERS = "os^Dv<>ph"
DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#000000", "#6b6b6b"
GRID = "#b0b0b0"
WIDE, NARROW = (7.4, 4.2), (3.7, 3.3)
"""Sizes in inches: for a page or a README, and for a telephone."""
WIDEST = 3.0
"""So many times above the highest value, and below the lowest, a logarithmic axis shows intervals."""
MANY_POINTS = 24
"""Curves with more of them get a band instead of bars, and no markers."""
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Endings of figures' files, and what is left out of each that would make its bytes others every time."""


@dataclass(frozen=True)
class Curve:
    """One line: its points, the ends of their 95% intervals where they are known, and its place in the palette."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int = 0


@dataclass(frozen=True)
class Axis:
    """What an axis counts. ``ticks``: where its numbers stand; by default that is chosen."""

    label: str
    scale: Scale = "linear"
    ticks: Sequence[float] | None = None
    limits: tuple[float, float] | None = None


def draw_curves(
    found: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    size: tuple[float, float] = WIDE,
    legend: bool = True,
    marks: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Draw curves into a new figure. ``marks``: dotted verticals at these x, each with a word beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    plot(axes, found, x, y, marks=marks)
    handles, _ = axes.get_legend_handles_labels()
    if legend and handles:
        legend_above(figure)
    return figure


def legend_above(figure: Figure) -> None:
    """Name what is drawn in a line or several above it, where no curve and no interval can lie under the names."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    entry = 0.5 + 0.075 * max(map(len, labels))  # inches that the longest takes, about
    columns = max(1, min(len(labels), int(figure.get_figwidth() / entry)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=8.5)


def plot(axes: Any, found: Sequence[Curve], x: Axis, y: Axis, *, marks: Sequence[tuple[float, str]] = ()) -> None:
    """Draw curves into matplotlib ``axes``."""
    for curve in found:
        _plot_one(axes, curve, x, y)
    for where, word in marks:
        axes.axvline(where, color=FAINT, linestyle=":", linewidth=1, zorder=0)
        axes.annotate(
            word, (where, 1), (4, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=8, color=FAINT,
        )  # fmt: skip
    _set_axis(axes, "x", x, [value for curve in found for value in curve.x])
    if y.scale != "linear" and y.limits is None:
        y = replace(y, limits=_reach(found))
    ends = [value for curve in found for value in (*curve.y, *(curve.low or ()), *(curve.high or ()))]
    # Numbers stand all along a logarithmic axis that has limits, not only where the points lie.
    _set_axis(axes, "y", y, list(y.limits) if y.limits and y.scale != "linear" else ends)
    axes.grid(color=GRID, alpha=0.3, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def save_figure(path: Path, figure: Figure) -> None:
    """Write ``path``, atomically, as its ending says, one of :data:`FORMATS`. The same figure makes the same bytes."""
    import matplotlib

    ending = path.suffix.lower()
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "samba-lm"}):
        figure.savefig(buffer, format=ending[1:], metadata=FORMATS[ending])
    with atomic_file(path) as tmp:
        tmp.write_bytes(buffer.getvalue())


def as_text(name: str) -> str:
    """A name for matplotlib to show as it is: no formula between dollars, and not hidden for its first letter."""
    plain = name.replace("$", r"\$")
    return f"\u200b{plain}" if plain.startswith("_") else plain


def short(size: float) -> str:
    """4096 as "4K"."""
    whole = round(size)
    for unit, letter in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if whole >= unit and whole % unit == 0:
            return f"{whole // unit}{letter}"
    return f"{whole:,}"


def _plot_one(axes: Any, curve: Curve, x: Axis, y: Axis) -> None:
    colour = PALETTE[curve.style % len(PALETTE)][0]
    low, high = curve.low or (math.nan,) * len(curve.y), curve.high or (math.nan,) * len(curve.y)
    # A logarithm has no place for what is not above zero.
    kept = [
        point
        for point in zip(curve.x, curve.y, low, high, strict=True)
        if math.isfinite(point[1]) and (x.scale == "linear" or point[0] > 0) and (y.scale == "linear" or point[1] > 0)
    ]
    if not kept:
        return
    xs, ys, lows, highs = ([point[i] for point in kept] for i in range(4))
    many = len(kept) > MANY_POINTS
    axes.plot(
        xs, ys, color=colour, label=as_text(curve.name), gid=f"named {curve.name}", linewidth=1.4,
        linestyle=DASHES[curve.style // len(PALETTE) % len(DASHES)],
        marker="" if many else MARKERS[curve.style % len(MARKERS)], markersize=4.2,
    )  # fmt: skip
    if y.scale != "linear":
        lows = [end if end > 0 else value for end, value in zip(lows, ys, strict=True)]
    if many:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    elif any(map(math.isfinite, lows)):
        below = [max(0.0, value - end) for value, end in zip(ys, lows, strict=True)]
        above = [max(0.0, end - value) for value, end in zip(ys, highs, strict=True)]
        axes.errorbar(xs, ys, yerr=(below, above), fmt="none", color=colour, elinewidth=0.9, capsize=2)


def _reach(found: Sequence[Curve]) -> tuple[float, float] | None:
    """How far a logarithmic axis reaches where intervals are so wide that the curves would be pressed flat between
    their ends; these then go on beyond the edge. None: they are not."""
    values = [value for curve in found for value in curve.y if 0 < value < math.inf]
    ends = [value for curve in found for value in (*(curve.low or ()), *(curve.high or ())) if 0 < value < math.inf]
    if not values or not ends:
        return None
    low, high = min(values) / WIDEST, max(values) * WIDEST
    if min(ends) > low and max(ends) < high:
        return None
    return max(low, min(*ends, *values) / 1.05), min(high, max(*ends, *values) * 1.05)


def _set_axis(axes: Any, which: str, axis: Axis, values: Sequence[float]) -> None:
    name = f"{axis.label}"
    getattr(axes, f"set_{which}label")(name, fontsize=9)
    set_scale, set_ticks = getattr(axes, f"set_{which}scale"), getattr(axes, f"set_{which}ticks")
    ticks = axis.ticks
    finite = [value for value in values if math.isfinite(value) and (axis.scale == "linear" or value > 0)]
    if axis.scale != "linear" and finite:
        set_scale("log", base=2 if axis.scale == "log2" else 10)
        ticks = ticks or (powers_of_2(min(finite), max(finite)) if axis.scale == "log2" else nice(finite))
        axes.minorticks_off()
    if ticks:
        set_ticks(ticks, [short(tick) if axis.scale == "log2" else f"{tick:,g}" for tick in ticks])
        if len(ticks) > 7 and axis.scale == "log2":
            axes.tick_params(axis=which, labelrotation=45)
    if axis.limits is not None:
        getattr(axes, f"set_{which}lim")(*axis.limits)


def powers_of_2(low: float, high: float) -> list[float]:
    """The powers of two from ``low`` to ``high``, a dozen at most; the ends as they are where there is none."""
    inside = [2.0**e for e in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]
    return inside[:: -(-len(inside) // 12)] if inside else sorted({low, high})


def nice(values: Sequence[float]) -> list[float]:
    """Round numbers within the span of ``values``, eight at most; its ends where there are none."""
    low, high = min(values), max(values)
    if 1.0001 * low < high < 4 * low:  # a logarithm that is almost even
        fine, margin = 10.0 ** math.floor(math.log10(high - low) - 1), 0.02 * (high - low)
        for step in (k * fine for k in (1, 2, 5, 10, 20, 50)):
            even = range(math.ceil((low - margin) / step), math.floor((high + margin) / step) + 1)
            if len(even) <= 8:
                return [float(f"{i * step:.6g}") for i in even]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladders: list[Sequence[float]] = [
        [i * step / 100 for i in range(100 // step, 1000 // step)] for step in (1, 2, 5, 10, 20, 50)
    ]
    ladders += [(1, 1.5, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)]
    for steps in ladders:
        found = [s * 10.0**e for e in decades for s in steps if low / 1.01 <= s * 10.0**e <= high * 1.01]
        if len(found) <= 8:
            break
    return found if len(found) > 1 else sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})
