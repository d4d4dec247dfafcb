from __future__ import annotations

import pytest

from samba_lm.eval.intervals import wilson


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
