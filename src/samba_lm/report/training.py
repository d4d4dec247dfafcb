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
from samba_lm.report.part import number

POINTS = 300
"""Of a curve, at most; each the mean of an equal share of the logged steps."""
TAIL = 0.05
"""Share of the steps, at the end, over which a loss is averaged."""
TOLD = ("batch_size", "length", "lr", "dtype", "seed", "device")
"""Values of a recipe's [train] that are shown."""


@dataclass(frozen=True)
class Loss:
    """A run's losses, nats a token, by the tokens read."""

    training: list[tuple[float, float]]
    validation: list[tuple[float, float]]


def part(trainings: Sequence[Training], styles: dict[str, int]) -> Html:
    """The page's part on trainings. ``styles``: places in the palette by label, of models that the page knows; more are
    added for the runs that it does not."""
    labels = shortest([training.path for training in trainings])
    for label in labels:
        styles.setdefault(label, len(styles))
    losses = [_losses(training.metrics) for training in trainings]
    names = [(label, styles[label]) for label in labels]
    figures = [_figure("training", [loss.training for loss in losses], names)]
    measured = [(loss.validation, name) for loss, name in zip(losses, names, strict=True) if loss.validation]
    if measured:
        figures.append(_figure("validation", [loss for loss, _ in measured], [name for _, name in measured]))
    rows = [_row(*each) for each in zip(trainings, losses, names, strict=True)]
    headings = ["run", "steps", "tokens", "training loss", "validation loss", "tokens/s", "minutes"]
    about = (
        "Losses in nats a token: they compare only where the tokenizer and the text are the same. The training loss in "
        "the table is the mean of the last 5% of the steps that were logged."
    )
    return section(
        "Training", paragraph(about), *figures, table(headings, rows), how(_made(trainings, labels)), anchor="training"
    )


def _figure(kind: str, found: Sequence[Sequence[tuple[float, float]]], names: Sequence[tuple[str, int]]) -> Html:
    curves = [
        Curve(label, [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points], style=style)
        for points, (label, style) in zip(map(_thin, found), names, strict=True)
    ]
    x, y = Axis("tokens read, millions"), Axis(f"{kind} loss, nats a token")
    caption = f"The {kind} loss by the tokens read."
    return curves_figure(
        lambda size: draw_curves(curves, x, y, size=size, legend=False), f"training-{kind}", caption, names
    )


def _losses(metrics: Sequence[dict[str, Any]]) -> Loss:
    def of(name: str) -> list[tuple[float, float]]:
        return [
            (float(record.get("tokens", record["step"])), float(record[name]))
            for record in metrics
            if isinstance(record.get(name), int | float)
        ]

    return Loss(of("loss"), of("val_loss"))


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    count = min(POINTS, len(points))
    edges = [i * len(points) // count for i in range(count + 1)] if count else []
    return [(points[b - 1][0], sum(loss for _, loss in points[a:b]) / (b - a)) for a, b in pairwise(edges)]


def _row(training: Training, loss: Loss, name: tuple[str, int]) -> list[object]:
    last = training.metrics[-1]
    tail = [value for _, value in loss.training[-max(1, round(TAIL * len(loss.training))) :]]
    speeds = [r["tokens_per_s"] for r in training.metrics if isinstance(r.get("tokens_per_s"), int | float)]
    seconds = training.state.get("seconds")
    return [
        named(*name),
        f"{last['step']:,}",
        f"{last['tokens']:,}" if isinstance(last.get("tokens"), int) else "-",
        number(sum(tail) / len(tail) if tail else None, 4),
        number(loss.validation[-1][1] if loss.validation else None, 4),
        number(statistics.median(speeds) if speeds else None, 0),
        number(seconds / 60 if isinstance(seconds, int | float) else None, 1),
    ]


def _made(trainings: Sequence[Training], labels: Sequence[str]) -> list[object]:
    """The recipe's values, where a checkpoint is there to tell them."""
    lines: list[object] = [tag("code", "samba-lm train RECIPE")]
    for training, label in zip(trainings, labels, strict=True):
        recipe = _dict(training.state.get("recipe"))
        values, model = _dict(recipe.get("train")), _dict(recipe.get("model"))
        told = [("model", model.get("name")), *((name, values.get(name)) for name in TOLD)]
        known = [(name, value) for name, value in told if value is not None]
        lines.append(join([f"{label}: ", facts([("folder", training.path), *known])]))
    return lines


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
