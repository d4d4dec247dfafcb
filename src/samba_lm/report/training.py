"""Trainings: the curves of their losses and a table, from metrics.jsonl and the newest checkpoint's trainer.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from samba_lm.figures import Axis, Curve, draw_curves
from samba_lm.report.found import Training
from samba_lm.report.markup import Html, join, tag
from samba_lm.report.models import shortest
from samba_lm.report.page import curves_figure, facts, how, named, paragraph, section, table
from samba_lm.report.part import number, whole

POINTS = 300
"""Of a curve, at most; each the mean of an equal share of the logged steps."""
TAIL = 0.05
"""Share of the steps, at the end, over which a loss is averaged."""
TOLD = ("batch_size", "length", "lr", "dtype", "seed", "device")
"""Values of a recipe's [train] that are shown."""

Points = list[tuple[int, float]]
"""Tokens read, and a loss in nats a token."""


@dataclass(frozen=True)
class Run:
    """A training: its folder, its last step, tokens read, losses, speed, and its recipe's values."""

    path: str
    steps: int
    tokens: int
    training: Points
    validation: Points
    tokens_per_s: float | None
    seconds: float | None
    recipe: list[tuple[str, object]]


def read(found: Training, path: str) -> Run:
    """A run's figures. Raises one of :data:`samba_lm.report.part.DAMAGED` for what is none."""
    last = found.metrics[-1]
    speeds = [float(record["tokens_per_s"]) for record in found.metrics if "tokens_per_s" in record]
    seconds = found.state.get("seconds")
    longest = max((record["length"] for record in found.metrics if record.get("length")), default=None)
    return Run(
        path=path,
        steps=whole(last["step"]),
        tokens=whole(last["tokens"]),
        training=_points([record for record in found.metrics if record.get("length") in (None, longest)], "loss"),
        validation=_points(found.metrics, "val_loss"),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        seconds=None if seconds is None else float(seconds),
        recipe=_recipe(found.state),
    )


def _points(metrics: Sequence[dict[str, Any]], name: str) -> Points:
    return [(whole(record["tokens"]), float(record[name])) for record in metrics if record.get(name) is not None]


def _recipe(state: dict[str, Any]) -> list[tuple[str, object]]:
    """The recipe's values, where a checkpoint is there to tell them."""
    recipe = _dict(state.get("recipe"))
    values, model = _dict(recipe.get("train")), _dict(recipe.get("model"))
    told = [("model", model.get("name")), *((name, values.get(name)) for name in TOLD)]
    return [(name, value) for name, value in told if value is not None]


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def part(runs: Sequence[Run], styles: dict[str, int]) -> Html:
    """The page's part on trainings. ``styles``: places in the palette by label, of models that the page knows; more are
    added for the runs that it does not."""
    labels = shortest([run.path for run in runs])
    for label in labels:
        styles.setdefault(label, len(styles))
    names = [(label, styles[label]) for label in labels]
    figures = [_figure("training", [run.training for run in runs], names)]
    measured = [(run.validation, name) for run, name in zip(runs, names, strict=True) if run.validation]
    if measured:
        figures.append(_figure("validation", [points for points, _ in measured], [name for _, name in measured]))
    headings = ["run", "steps", "tokens", "training loss", "validation loss", "tokens/s", "minutes"]
    rows = [_row(run, name) for run, name in zip(runs, names, strict=True)]
    about = (
        "Losses in nats a token: they compare only where the tokenizer and the text are the same. The training loss in "
        "the table is the mean of the last 5% of the steps that were logged. Of rows of several lengths it and the "
        "curve are the longest's."
    )
    made: list[object] = [tag("code", "samba-lm train RECIPE")]
    made += [
        join([f"{label}: ", facts([("folder", run.path), *run.recipe])])
        for run, label in zip(runs, labels, strict=True)
    ]
    return section("Training", paragraph(about), *figures, table(headings, rows), how(made), anchor="training")


def _figure(kind: str, found: Sequence[Points], names: Sequence[tuple[str, int]]) -> Html:
    curves = [
        Curve(label, [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points], style=style)
        for points, (label, style) in zip(map(_thin, found), names, strict=True)
    ]
    x, y = Axis("tokens read, millions"), Axis(f"{kind} loss, nats a token")
    caption = f"The {kind} loss by the tokens read."
    return curves_figure(
        lambda size: draw_curves(curves, x, y, size=size, legend=False), f"training-{kind}", caption, names
    )


def _thin(points: Points) -> Points:
    count = min(POINTS, len(points))
    edges = [i * len(points) // count for i in range(count + 1)] if count else []
    return [(points[b - 1][0], sum(loss for _, loss in points[a:b]) / (b - a)) for a, b in pairwise(edges)]


def _row(run: Run, name: tuple[str, int]) -> list[object]:
    tail = [loss for _, loss in run.training[-max(1, round(TAIL * len(run.training))) :]]
    return [
        named(*name),
        f"{run.steps:,}",
        f"{run.tokens:,}",
        number(sum(tail) / len(tail) if tail else None, 4),
        number(run.validation[-1][1] if run.validation else None, 4),
        number(run.tokens_per_s, 0),
        number(None if run.seconds is None else run.seconds / 60, 1),
    ]
