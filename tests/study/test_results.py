"""What is computed from records."""

from __future__ import annotations

import math

import pytest

from samba_lm.study.results import Cell, difference, rank_correlation
from samba_lm.study.tables import grid, number, signed, slug


def cell(*means: float, losses: tuple[float, ...] | None = None) -> Cell:
    loss = sum(means) / len(means) if means else math.nan
    return Cell(1024, 0, len(means), 1000, losses or ((loss,) if means else ()), means, "")


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
