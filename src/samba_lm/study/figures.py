"""Drawing a study: perplexity against length, differences from one model, and what the sweeps saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from samba_lm.figures import Axis, Curve, nice, plot, short
from samba_lm.study.results import Found, Results, View, difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (9.6, 4.4)
NEAR = 30.0
"""Percent: differences and ends of intervals up to this decide what is shown; curves that go beyond are named so."""
FAR = 3.0
"""Perplexities above so many times the lowest are cut off: how bad is in the table."""


def perplexity_figure(results: Results, models: Sequence[Found], view: View) -> Figure | None:
    """Perplexity against length; None where nothing was measured.

    Without intervals: those of the text are the same for all models and far wider than the differences (see
    :func:`difference_figure`).
    """
    curves = []
    for style, each in enumerate(_in_order(results, models)):
        cells = [cell for cell in each.cells(view).values() if cell.losses]
        if cells:
            lengths, values = [cell.length for cell in cells], [cell.perplexity for cell in cells]
            curves.append(Curve(each.title, lengths, values, style=style))
    lowest = min((min(curve.y) for curve in curves), default=math.nan)
    highest = max((y for curve in curves for y in curve.y if y <= FAR * lowest), default=math.nan)
    curves = [replace(one, name=f"{one.name} (goes on above)") if max(one.y) > highest else one for one in curves]
    if not curves:
        return None
    y = Axis("perplexity", "log10", ticks=nice([lowest, highest]), limits=(lowest / 1.03, highest * 1.03))
    return _draw(results, curves, view, y)


def difference_figure(results: Results, models: Sequence[Found], view: View) -> Figure | None:
    """How much higher perplexity is than the reference's, in percent, with 95% intervals of window by window."""
    reference = results.reference
    if reference is None:
        return None
    ours = reference.cells(view)
    curves = []
    for style, each in enumerate(_in_order(results, models)):
        points = [
            (cell.length, difference(cell, ours[cell.length]))
            for cell in each.cells(view).values()
            if cell.losses and cell.length in ours and ours[cell.length].losses
        ]
        if points:
            lows, means, highs = (
                [percent(value) for value in column]
                for column in zip(*((mean.low, mean.mean, mean.high) for _, mean in points), strict=True)
            )
            known = not any(map(math.isnan, lows))  # of one window alone there is no interval
            ends = (lows, highs) if known else (None, None)
            curves.append(Curve(each.title, [length for length, _ in points], means, ends[0], ends[1], style))
    drawn = [y for curve in curves for values in (curve.y, curve.low or (), curve.high or ()) for y in values]
    near = [y for y in drawn if y < NEAR]
    if len(curves) < 2 or not any(y < NEAR for curve in curves for y in curve.y):
        return None
    low, high = min(0.0, *near), max(0.0, *near)
    limits = (low - 0.1 * (high - low), high + 0.1 * (high - low))
    curves = [replace(curve, name=f"{curve.name}{_beyond(curve, limits[1])}") for curve in curves]
    label = f"perplexity above {reference.title}'s (%)"
    return _draw(results, curves, view, Axis(label, limits=limits if high > low else None))


def _beyond(curve: Curve, top: float) -> str:
    """What stands behind the name of a curve that leaves the figure."""
    return " (above)" if min(curve.y) > top else " (goes on above)" if max(curve.y) > top else ""


def sweep_figure(results: Results) -> Figure | None:
    """Validation loss of the short trainings against the learning rate; None without a sweep."""
    curves = []
    for style, (name, records) in enumerate(results.sweeps.items()):
        done = [record for record in records if record.status == "done" and record.val_loss is not None]
        if done:
            losses = [record.val_loss for record in done if record.val_loss is not None]
            curves.append(Curve(results.of(name).title, [record.lr for record in done], losses, style=style))
    if not curves:
        return None
    rates = sorted({rate for curve in curves for rate in curve.x})
    x = Axis("peak learning rate", "log10", ticks=rates if len(rates) <= 10 else None)
    return _curves(curves, x, Axis("validation loss (nats a token)"), ())


def _in_order(results: Results, models: Sequence[Found]) -> list[Found]:
    """The reference first, so that it looks the same in every figure."""
    return sorted(models, key=lambda each: each.run.name != results.study.reference)


def percent(loss: float) -> float:
    """A difference of losses as one of perplexities, in percent."""
    return 100 * math.expm1(min(loss, 50.0))


def _draw(results: Results, curves: Sequence[Curve], view: View, y: Axis) -> Figure:
    lengths = sorted({float(length) for curve in curves for length in curve.x})
    label = "place in the document (tokens)" if view.evaluation.protocol == "stream" else "context (tokens)"
    trained = results.trained_length
    marks = () if trained is None else ((trained, f"trained on {short(trained)}"),)
    return _curves(curves, Axis(label, "log2", ticks=lengths if len(lengths) <= 12 else None), y, marks)


def _curves(curves: Sequence[Curve], x: Axis, y: Axis, marks: Sequence[tuple[float, str]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=150, layout="constrained")
    plot(figure.subplots(), curves, x, y, marks=marks)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return figure
