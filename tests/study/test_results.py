"""What is computed from records."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from samba_lm.eval.intervals import mean_interval
from samba_lm.eval.perplexity import LengthResult
from samba_lm.study.results import Cell, _cell, difference, rank_correlation
from samba_lm.study.tables import grid, number, signed, slug
from samba_lm.study.worker import compact


def cell(*means: float, losses: tuple[float, ...] | None = None) -> Cell:
    loss = sum(means) / len(means) if means else math.nan
    return Cell(1024, 0, len(means), 1000, losses or ((loss,) if means else ()), means, (1,) * len(means), (), "")


def test_two_models_are_compared_window_by_window() -> None:
    hard, easy = 5.0, 1.0
    reference = cell(hard, easy, 3.0)
    found = difference(cell(hard + 0.11, easy + 0.09, 3.1), reference)
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - 4.3027 * 0.01 / math.sqrt(3), abs=1e-5)
    low, high = reference.interval
    assert high - low > 100 * (math.exp(found.high) - math.exp(found.low)), "the text itself varies far more"
    lone = difference(cell(3.1), cell(3.0))
    assert lone.mean == pytest.approx(0.1)
    assert math.isnan(lone.low)
    assert math.isnan(difference(cell(losses=(3.1,)), cell(losses=(3.0,))).low)


def measured(means: list[float], length: int = 1024) -> dict[str, Any]:
    """A row of a record, of windows with these means."""
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    result = LengthResult(length, (1, length), len(means), 9, float(np.mean(means)), error, 1.0, None, "", tuple(means))
    return compact(asdict(result))


def test_of_many_windows_groups_are_kept_and_give_intervals() -> None:
    random = np.random.RandomState(0)
    text = random.standard_normal(1300).tolist()
    near = [value + 0.1 + 0.01 * noise for value, noise in zip(text, random.standard_normal(1300), strict=True)]
    rows = [measured(text), measured(near)]
    assert [(len(row["means"]), row["group"]) for row in rows] == [(434, 3)] * 2
    one, other = (_cell(1024, [row]) for row in rows)
    assert one.sizes == (3,) * 433 + (1,)
    low, high = one.interval
    exact = mean_interval(text)
    assert (math.log(low), math.log(high)) == (pytest.approx(exact.low, abs=0.01), pytest.approx(exact.high, abs=0.01))
    found = difference(other, one)
    assert found.mean == pytest.approx(0.1, abs=0.002)
    assert found.reach == pytest.approx(1.96 * 0.01 / math.sqrt(1300), rel=0.1)


def test_records_of_earlier_versions_give_the_intervals_that_they_can() -> None:
    values = np.random.RandomState(0).standard_normal(600).tolist()
    old = {**measured(values), "means": []}
    del old["group"]
    cell = _cell(1024, [old])
    exact = mean_interval(values)
    assert [math.log(end) for end in cell.interval] == pytest.approx([exact.low, exact.high])
    assert math.isnan(difference(cell, _cell(1024, [measured(values)])).low), "of the two together nothing is known"
    assert math.isnan(_cell(1024, [{**old, "standard_error": None}]).interval[0])


def test_means_that_are_not_finite_are_not_kept() -> None:
    assert measured([1.0, math.nan])["means"] == []


def test_seeds_are_averaged_in_losses() -> None:
    both = cell(2.0, 4.0, losses=(2.9, 3.1))
    assert both.perplexity == pytest.approx(math.exp(3.0))
    assert both.seeds == pytest.approx((math.exp(2.9), math.exp(3.1)))
    assert cell(3.0).seeds is None
    assert math.isnan(cell().perplexity)


def test_the_order_of_two_tables() -> None:
    assert rank_correlation([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_figures_of_a_table() -> None:
    texts = [number(value) for value in (1.234, 123.4, 12345.6, 1.5e7, math.inf, math.nan)]
    assert texts == ["1.23", "123.4", "12,346", "1.5e+07", "inf", "–"]  # noqa: RUF001 - a dash
    assert [signed(value) for value in (1.26, -5.04, 300.0, 4000.0)] == ["+1.3", "-5.0", "x4.0", "x41.0"]
    assert slug("Table 3") == "table-3"
    assert grid(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
