"""Scores of tasks as a figure: a row for each task, a point with its 95% interval for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samba_lm.figures import GRID, MARKERS, PALETTE, as_text, legend_above, save_figure

if TYPE_CHECKING:
    from samba_lm.eval.harness.run import Score


def write_figure(path: Path, found: Mapping[str, Sequence[Score]]) -> None:
    """Write the figure ``path``: each task's first figure, where that is a share, of each model by its name."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(score.task for scores in found.values() for score in scores if _shown(score)))
    figure = Figure(figsize=(7.4, 1.4 + 0.34 * max(1, len(tasks)) * max(1, len(found)) ** 0.5), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for i, (name, scores) in enumerate(found.items()):
        colour, marker = PALETTE[i % len(PALETTE)][0], MARKERS[i % len(MARKERS)]
        offset = (i - (len(found) - 1) / 2) * 0.6 / max(1, len(found))
        shown = [score for score in scores if _shown(score)]
        axes.plot([], [], color=colour, marker=marker, linestyle="", markersize=4.5, label=as_text(name))
        for score in shown:
            metric, at = score.metrics[0], tasks.index(score.task) + offset
            axes.plot(100 * metric.value, at, color=colour, marker=marker, markersize=4.5)
            if metric.low is not None and metric.high is not None:
                axes.hlines(at, 100 * metric.low, 100 * metric.high, color=colour, linewidth=1.1)
    labels = {score.task: score.metrics[0].name for scores in found.values() for score in scores if _shown(score)}
    axes.set_yticks(range(len(tasks)), [f"{task}\n{labels[task]}" for task in tasks], fontsize=8.5)
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlabel("%, with 95% intervals", fontsize=9)
    axes.grid(axis="x", color=GRID, alpha=0.3, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if found:
        legend_above(figure)
    save_figure(path, figure)


def _shown(score: Score) -> bool:
    return bool(score.metrics) and score.metrics[0].is_share
