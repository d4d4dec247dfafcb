"""Figures of perplexity: what is drawn, what is drawn twice, what is marked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from samba_lm.eval.perplexity import LengthResult
from samba_lm.eval.perplexity_figure import APART, Line, curve, draw, nearest

LENGTHS = (1024, 2048, 4096)


def _line(name: str, values: list[float | None], trained: int | None = 1024) -> Line:
    results = []
    for length, value in zip(LENGTHS, values, strict=True):
        if value is None:
            results.append(LengthResult(length, (1, length), 0, 0, math.nan, math.nan, math.nan, None, "no memory"))
        else:
            loss = math.log(value)
            results.append(LengthResult(length, (1, length), 9, 9 * length, loss, 0.01, value, loss / 2, ""))
    return Line(name, results, trained)


def _data(line: Any) -> list[tuple[float, float]]:
    return [(round(x), round(y, 3)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_a_curve_has_what_was_measured_and_its_intervals() -> None:
    one = curve(_line("a", [10, None, 8]), 3)
    assert (one.x, one.style) == ([1024, 4096], 3)
    assert one.y == pytest.approx([10, 8])
    assert one.low is not None
    assert one.high is not None
    reach = 2.306004 * 0.01  # Student's t with 8 degrees of freedom
    assert one.low == pytest.approx([10 * math.exp(-reach), 8 * math.exp(-reach)])
    assert one.high == pytest.approx([10 * math.exp(reach), 8 * math.exp(reach)])
    bits = curve(_line("a", [10, None, 8]), 0, bits=True)
    assert bits.y == pytest.approx([math.log(10) / 2, math.log(8) / 2])


def test_models_near_the_best_are_drawn_again_where_others_are_far() -> None:
    good, better, bad = _line("good", [11, 10, 9]), _line("better", [10, 9, 8]), _line("bad", [12, 80, None])
    curves = [curve(line, i) for i, line in enumerate((good, better, bad))]
    assert [one.name for one in nearest(curves)] == ["good", "better"]
    assert nearest(curves[:2]) == nearest([curves[1], curves[2]]) == nearest([]) == []
    upper, lower = draw("full-window", [good, better, bad]).axes
    assert (upper.get_xscale(), upper.get_yscale()) == ("log", "log")
    names = [line.get_label() for line in upper.get_lines()]
    assert {"good", "better", "bad"} <= set(names)
    drawn = {line.get_label(): line for line in lower.get_lines()}
    assert _data(drawn["better"]) == [(1024, 10), (2048, 9), (4096, 8)]
    assert _data(drawn["good"]) == [(round(x / APART), y) for x, y in zip(LENGTHS, (11, 10, 9), strict=True)]
    assert "bad" not in drawn
    crosses = [line for line in upper.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[4096]]
    told = [text.get_text() for text in upper.texts]
    assert told == ["trained on 1K"]
    (alone,) = draw("stream", [replace(good, trained=512)]).axes
    assert not alone.texts  # that is left of all that was measured
    assert "since the point before" in alone.get_xlabel()


def test_twelve_models_have_their_names_beside_the_figure() -> None:
    lines = [_line(f"model {i}", [10 + i / 10, 9 + i / 10, 8 + i / 10], 1024 * (1 + i % 2)) for i in range(12)]
    figure = draw("full-window", lines, bits=True)
    (axes,) = figure.axes
    assert axes.get_legend() is None
    assert len(figure.legends[0].get_texts()) == 12
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines() if line.get_label() in
              {one.name for one in lines}}  # fmt: skip
    assert len(styles) == 12
    assert axes.get_ylabel() == "bits a byte"
    assert [text.get_text() for text in axes.texts] == ["trained on 1K", "trained on 2K"]
    assert len(axes.get_yticks()) > 3


def test_nothing_measured_is_an_empty_figure() -> None:
    (axes,) = draw("prefix", [_line("a", [None, None, None])]).axes
    assert axes.get_legend() is None
