"""What was found again over a training: right answers by the step, of the checkpoints that a run has kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeVar

from samba_lm.eval.recall_figure import Spots, share_curves
from samba_lm.figures import WIDE, Axis, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


def by_run(found: Mapping[str, T]) -> dict[str, dict[int, T]]:
    """Of ``found`` by checkpoint, the runs of which there are several steps (``RUN/step-00001000``): by the shortest
    name that tells a run from the others, then by step, in order. The run in the current folder has no name."""
    runs: dict[str, dict[int, T]] = {}
    for checkpoint, value in found.items():
        match = re.fullmatch(r"(?:(.+)/)?step-(\d{1,15})", checkpoint.rstrip("/"))
        if match:
            runs.setdefault(match[1] or "", {})[int(match[2])] = value
    several = {run: dict(sorted(steps.items())) for run, steps in runs.items() if len(steps) > 1}
    last = [PurePath(run).name for run in several]
    return {run if last.count(name) > 1 else name: several[run] for run, name in zip(several, last, strict=True)}


def lines(runs: Mapping[str, Mapping[int, Spots]], unit: str) -> dict[str, list[tuple[int, int, int]]]:
    """A line for each run and size, by its name: step, right answers and all, over all depths. None of what was skipped
    at every step."""
    found = {}
    for run, steps in runs.items():
        sizes = sorted({size for spots in steps.values() for size, _ in spots})
        for size in sizes:
            points = []
            for step, spots in steps.items():
                here = [spot for (other, _), spot in spots.items() if other == size]
                points.append((step, sum(spot.right for spot in here), sum(spot.total for spot in here)))
            measured = [point for point in points if point[2]]
            if measured:
                found[f"{run}, {short(size)} {unit}" if run else f"{short(size)} {unit}"] = measured
    return found


def step_curves(
    runs: Mapping[str, Mapping[int, Spots]],
    unit: str,
    *,
    size: tuple[float, float] = WIDE,
    legend: bool = True,
    title: str = "",
) -> Figure:
    """The share of right answers by the step, with 95% intervals; ``runs`` as :func:`by_run` gives them."""
    return share_curves(lines(runs, unit), Axis("steps of the training"), size=size, legend=legend, title=title)
