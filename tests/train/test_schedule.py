from __future__ import annotations

import math

import pytest

from samba_lm.train.schedule import learning_rate, warmup_steps


def rates(steps: int, warmup_fraction: float, min_ratio: float) -> list[float]:
    return [
        learning_rate(step, steps=steps, peak=2.0, warmup_fraction=warmup_fraction, min_ratio=min_ratio)
        for step in range(steps)
    ]


def test_known_values() -> None:
    got = rates(14, warmup_fraction=4 / 14, min_ratio=0.1)
    assert got[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert got[8] == pytest.approx(2.0 * 0.55), "half-way down the cosine stands half-way between peak and end"
    assert got[5] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2))))
    assert got[-1] == pytest.approx(0.2)


def test_shape() -> None:
    got = rates(1000, warmup_fraction=0.01, min_ratio=0.1)
    peak = got.index(max(got))
    assert peak == 9
    assert got[: peak + 1] == sorted(got[: peak + 1])
    assert got[peak:] == sorted(got[peak:], reverse=True)


def test_no_warmup_and_no_floor() -> None:
    got = rates(10, warmup_fraction=0.0, min_ratio=0.0)
    assert got[0] < 2.0
    assert got[-1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("steps", "fraction", "expected"), [(1000, 0.01, 10), (10, 0.01, 1), (1, 0.5, 1), (10, 0.99, 9)]
)
def test_warmup_steps(steps: int, fraction: float, expected: int) -> None:
    assert warmup_steps(steps, fraction) == expected


def test_a_run_that_went_on_stays_at_the_end_value() -> None:
    assert learning_rate(99, steps=10, peak=1.0, warmup_fraction=0.1, min_ratio=0.1) == pytest.approx(0.1)


def test_one_step() -> None:
    assert rates(1, warmup_fraction=0.01, min_ratio=0.1) == [2.0]


def scheduled(step: int, **fields: object) -> float:
    shared = {"steps": 100, "peak": 2.0, "warmup_fraction": 0.1, "min_ratio": 0.1}
    return learning_rate(step, **{**shared, **fields})  # type: ignore[arg-type]


def test_wsd_stays_at_the_peak_and_falls_at_the_end() -> None:
    got = [scheduled(step, schedule="wsd", decay_fraction=0.25) for step in range(110)]
    assert got[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert got[9:75] == [2.0] * 66
    assert got[75] == pytest.approx(0.2 + 1.8 * (1 - math.sqrt(1 / 25)))
    assert got[99:] == pytest.approx([0.2] * 11)
    line = [scheduled(step, schedule="wsd", decay_fraction=0.25, decay="linear") for step in range(100)]
    assert line[87] == pytest.approx(0.2 + 1.8 * (1 - 13 / 25))
    assert line[:75] == got[:75]


def test_a_longer_wsd_run_has_the_same_beginning() -> None:
    """So a run may go on from before its decay with more steps."""
    assert scheduled(60, schedule="wsd") == scheduled(60, schedule="wsd", steps=1000, warmup_fraction=0.01)


def test_wsd_of_a_run_that_is_all_warmup_and_decay() -> None:
    got = [scheduled(step, schedule="wsd", warmup_fraction=0.5, decay_fraction=0.5) for step in range(100)]
    assert got.index(max(got)) == 49
    assert got[50:] == sorted(got[50:], reverse=True)
    assert got[-1] == pytest.approx(0.2)
    assert scheduled(0, schedule="wsd", steps=1, decay_fraction=1.0) == 2.0


def test_linear_and_constant() -> None:
    line = [scheduled(step, schedule="linear") for step in range(105)]
    assert line[9] == 2.0
    assert line[54] == pytest.approx(0.2 + 1.8 / 2)
    assert line[99:] == pytest.approx([0.2] * 6)
    assert [scheduled(step, schedule="constant") for step in range(9, 105)] == [2.0] * 96
    assert scheduled(4, schedule="constant") == pytest.approx(1.0)
