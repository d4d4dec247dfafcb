"""Loss curves as a picture: the losses above, their differences from the CPU's below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from samba_lm.bench.curve import PLAIN, WAYS
from samba_lm.figures import save_figure

COLOURS = {"cpu": "0.25", "gpu fp32": "#1d4ed8", "gpu bf16": "#c2410c", "gpu bf16 plain": "#0f766e"}
SMOOTH = 10
"""Steps in the running mean of the differences."""


def write_figure(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Write the figure ``path``, atomically. ``curves``: losses by the names of WAYS, nats a token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 6.4), dpi=150, layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, colour in COLOURS.items():
        if name not in curves:
            continue
        steps = range(1, len(curves[name]) + 1)
        losses.plot(steps, curves[name], color=colour, linewidth=1, label=WAYS[name].title)
        if name != "cpu" and "cpu" in curves:
            off = [a - b for a, b in zip(curves[name], curves["cpu"], strict=True)]
            differences.plot(steps, off, color=colour, linewidth=0.5, alpha=0.35)
            differences.plot(steps, _running(off), color=colour, linewidth=1.2, label=f"{name} - cpu")
    if curves.keys() >= {"gpu bf16", PLAIN}:
        spread = [a - b for a, b in zip(curves["gpu bf16"], curves[PLAIN], strict=True)]
        label = f"gpu bf16 - {PLAIN}"
        differences.plot(range(1, len(spread) + 1), _running(spread), color="0.5", linestyle=":", label=label)
    losses.set_ylabel("training loss (nats a token)")
    differences.set_ylabel(f"difference (nats), and its mean of {SMOOTH}")
    differences.set_xlabel("step")
    differences.axhline(0, color="0.25", linewidth=0.6)
    for axes in (losses, differences):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    save_figure(path, figure)


def _running(values: Sequence[float]) -> list[float]:
    """Each point the mean of the last SMOOTH values up to it."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - SMOOTH) : i + 1])]
