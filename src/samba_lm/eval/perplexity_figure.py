"""Drawing perplexity against context length, of several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samba_lm.eval.perplexity import LengthResult
from samba_lm.eval.protocols import Protocol
from samba_lm.figures import WIDE, Axis, Curve, plot, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALONG: dict[Protocol, str] = {
    "stream": "place in the document (tokens since the point before)",
    "sliding-window": "tokens of the text",
}
"""What lengths are, where they are not context."""
MANY = 5
"""More models than that have their names beside the figure, not in it."""


@dataclass(frozen=True)
class Line:
    """A model's results, and the length it was trained on, where that is known."""

    name: str
    results: Sequence[LengthResult]
    trained: int | None = None


def draw(protocol: Protocol, lines: Sequence[Line], *, bits: bool = False, size: tuple[float, float] = WIDE) -> Figure:
    """Draw perplexity (with ``bits``, bits a byte) against length into a new figure, with 95% intervals.

    A length that a model could not be measured at, for its memory, has a cross at the upper edge.
    """
    from matplotlib.figure import Figure

    beside = len(lines) > MANY
    figure = Figure(figsize=(size[0] + 2.2 * beside, size[1]), dpi=150, layout="constrained")
    axes = figure.subplots()
    lengths = sorted({result.length for line in lines for result in line.results})
    x = Axis(ALONG.get(protocol, "context (tokens)"), "log2", ticks=lengths if len(lengths) <= 12 else None)
    y = Axis("bits a byte" if bits else "perplexity", "log10")
    curves = [curve(line, i, bits=bits) for i, line in enumerate(lines)]
    plot(axes, curves, x, y, marks=trained_marks(lines))
    if axes.get_legend_handles_labels()[0]:
        if beside:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
        else:
            axes.legend(frameon=False, fontsize=8.5)
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


def trained_marks(lines: Sequence[Line]) -> list[tuple[float, str]]:
    """Where dotted lines say that models were trained on rows of this length."""
    return [
        (length, f"trained on {short(length)}") for length in sorted({line.trained for line in lines if line.trained})
    ]
