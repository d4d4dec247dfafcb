"""Drawing perplexity against context length, of several models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from samba_lm.eval.perplexity import LengthResult
from samba_lm.eval.protocols import Protocol
from samba_lm.figures import PALETTE, WIDE, Axis, Curve, plot, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALONG: dict[Protocol, str] = {
    "stream": "place in the document (tokens; each point counts those since the point before)",
    "sliding-window": "tokens of the text",
}
"""What lengths are, where they are not context."""
MANY = 5
"""More models than that have their names beside the figure, not in it."""
NEAR = 1.5
"""A model that is never worse than the best by this factor is drawn a second time, larger, where others are."""
APART = 1.008
"""The factor in length by which the models' points stand apart."""
NARROW = 4.0
"""A smaller range of values has ticks at round numbers, not at one to five times powers of ten."""


@dataclass(frozen=True)
class Line:
    """A model's results, and the length it was trained on, where that is known."""

    name: str
    results: Sequence[LengthResult]
    trained: int | None = None


def draw(protocol: Protocol, lines: Sequence[Line], *, bits: bool = False, size: tuple[float, float] = WIDE) -> Figure:
    """Draw perplexity (with ``bits``, bits a byte) against length into a new figure, with 95% intervals.

    Where some models are far worse than others, the better ones are drawn again below, larger. A length at which one
    model could be measured and another could not, for its memory, has the other's cross at the upper edge.
    """
    from matplotlib.figure import Figure

    curves = [curve(line, i, bits=bits) for i, line in enumerate(lines)]
    near = nearest(curves)
    beside = len(lines) > MANY
    width, height = size[0] + 2.2 * beside, size[1] * (1.7 if near else 1)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(2 if near else 1, 1, sharex=True, squeeze=False, height_ratios=(2, 3) if near else (1,))
    lengths = sorted({int(x) for one in curves for x in one.x})
    ticks = lengths if len(lengths) <= 12 else None
    along = ALONG.get(protocol, "context (tokens)")
    what = "bits a byte" if bits else "perplexity"
    for part, some in zip(axes[:, 0], [curves, near] if near else [curves], strict=True):
        shown = [_aside(one, one.style - (len(lines) - 1) / 2) for one in some]
        x = Axis(along if part is axes[-1, 0] else "", "log2", ticks=ticks)
        plot(part, shown, x, _axis(what, some), marks=trained_marks(lines))
    if near:
        axes[0, 0].tick_params(labelbottom=False)
    _cross(axes[0, 0], lines)
    if axes[0, 0].get_legend_handles_labels()[0]:
        style = {"frameon": False, "fontsize": 8.5, "handlelength": 3.2}
        if beside:
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", **style)
        else:
            axes[0, 0].legend(**style)
    return figure


def curve(line: Line, style: int, *, bits: bool = False) -> Curve:
    """A model's results as a curve, but for the lengths that have none."""
    measured = [result for result in line.results if result.windows]
    values = [result.bits_per_byte if bits else result.perplexity for result in measured]
    ends = [result.bits_interval if bits else result.interval for result in measured]
    kept = [i for i, value in enumerate(values) if value is not None]
    return Curve(
        line.name,
        [measured[i].length for i in kept],
        [float(value) for value in values if value is not None],
        [ends[i][0] for i in kept],
        [ends[i][1] for i in kept],
        style,
    )


def nearest(curves: Sequence[Curve]) -> list[Curve]:
    """The curves that stay near the best one, where there are at least two of them and others that do not."""
    best: dict[float, float] = {}
    for one in curves:
        for x, y in zip(one.x, one.y, strict=True):
            best[x] = min(y, best.get(x, math.inf))
    near = [one for one in curves if one.y and all(y < NEAR * best[x] for x, y in zip(one.x, one.y, strict=True))]
    return near if 1 < len(near) < len(curves) else []


def trained_marks(lines: Sequence[Line]) -> list[tuple[float, str]]:
    """Where dotted lines say that models were trained on rows of this length, if what was measured reaches there."""
    measured = [result.length for line in lines for result in line.results if result.windows]
    trained = sorted({line.trained for line in lines if line.trained})
    low, high = min(measured, default=0), max(measured, default=0)
    return [(length, f"trained on {short(length)}") for length in trained if low <= length <= high]


def _aside(one: Curve, places: float) -> Curve:
    """A little to the side, so that intervals do not hide one another."""
    return replace(one, x=[x * APART**places for x in one.x])


def _axis(what: str, curves: Sequence[Curve]) -> Axis:
    from matplotlib.ticker import MaxNLocator

    values = [y for one in curves for y in (*one.y, *(one.low or ()), *(one.high or ())) if math.isfinite(y) and y > 0]
    if not values or max(values) > NARROW * min(values):
        return Axis(what, "log10")
    low, high = min(values), max(values)
    ticks = [float(tick) for tick in MaxNLocator(8).tick_values(low, high) if low <= tick <= high]
    return Axis(what, "log10", ticks=ticks or None)


def _cross(axes: Any, lines: Sequence[Line]) -> None:
    """Mark at the upper edge what could not be measured of one model, and could of another."""
    measured = {result.length for line in lines for result in line.results if result.windows}
    taken: Counter[int] = Counter()
    for i, line in enumerate(lines):
        colour = PALETTE[i % len(PALETTE)][0]
        for result in line.results:
            if not result.windows and result.length in measured:
                height = 1.02 + 0.04 * taken[result.length]
                taken[result.length] += 1
                axes.plot(
                    [result.length], [height], marker="x", markersize=5, linestyle="", color=colour,
                    transform=axes.get_xaxis_transform(), clip_on=False, label="_",
                )  # fmt: skip
