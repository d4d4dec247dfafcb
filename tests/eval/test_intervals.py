from __future__ import annotations

import math

import numpy as np
import pytest

from samba_lm.eval.intervals import grouped_interval, mean_interval, student, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # The first two are Brown, Cai and DasGupta's formula by hand, the others R's prop.test(correct = FALSE).
    [(0, 5, 0.0, 0.43448), (5, 5, 0.56552, 1.0), (8, 10, 0.49016, 0.94331), (1, 2, 0.09453, 0.90547)],
)
def test_known_intervals(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_more_tries_tell_more() -> None:
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (2, 10, 100, 10_000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == pytest.approx(2 * 1.96 * 0.5 / 100, rel=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_what_is_no_count() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


@pytest.mark.parametrize(
    ("degrees", "t"),  # a printed table's (Abramowitz and Stegun, 26.10)
    [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980), (10**6, 1.960)],
)
def test_students_table(degrees: int, t: float) -> None:
    assert student(degrees) == pytest.approx(t, abs=5e-4)


def test_means() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.count) == (2.5, 4)
    assert found.reach == pytest.approx(3.1824463 * math.sqrt(5 / 3 / 4))
    assert (found.low, found.high) == (pytest.approx(2.5 - found.reach), pytest.approx(2.5 + found.reach))
    assert mean_interval([7.0, 7.0]).reach == 0.0
    alone = mean_interval([7.0])
    assert alone.mean == 7.0
    assert math.isnan(alone.low)
    assert math.isnan(alone.reach)
    assert math.isnan(mean_interval([]).mean)
    with pytest.raises(ValueError, match="none"):
        student(0)


def test_means_of_groups() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    alone, together = mean_interval(values), grouped_interval(values, "abcd")
    assert together.mean == alone.mean
    assert together.reach == pytest.approx(alone.reach)
    # Four copies of every value tell no more than one.
    again = grouped_interval(values * 4, "abcd" * 4)
    assert (again.mean, again.count) == (alone.mean, 16)
    assert again.reach == pytest.approx(alone.reach)
    assert math.isnan(grouped_interval(values, "aaaa").low)
    assert math.isnan(grouped_interval([], []).mean)


def test_intervals_of_groups_hold_the_truth_as_often_as_they_say() -> None:
    random, held = np.random.RandomState(0), 0
    for _ in range(2000):
        sizes = random.randint(1, 6, size=30)
        groups = np.repeat(np.arange(30), sizes)
        values = random.standard_normal(30)[groups] + random.standard_normal(groups.size)
        found = grouped_interval(values.tolist(), groups.tolist())
        held += found.low <= 0 <= found.high
    assert 0.93 < held / 2000 < 0.965
