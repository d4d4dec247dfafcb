"""Rotary positions: exact at ten million tokens, and a function of distance alone."""

from __future__ import annotations

from fractions import Fraction
from math import cos, pi, sin

import pytest
import torch

from samba_lm.ops.rope import rope_angles, rotate


def exact(position: int, frequency: float) -> tuple[float, float]:
    """cos, sin of the product without rounding it: reduced modulo 2 pi in rational arithmetic."""
    turn = Fraction(
        "6.28318530717958647692528676655900576839433879875021164194988918461563281257241799725606965068423413596429617"
    )
    angle = Fraction(position) * Fraction(frequency)
    rest = float(angle - turn * (angle // turn))
    return cos(rest), sin(rest)


@pytest.mark.parametrize("position", [0, 1, 4095, 1_000_003, 10_000_019, 10_000_000_019])
def test_angles_are_exact_far_out(position: int) -> None:
    c, s = rope_angles(torch.tensor([position]), 64, 10_000.0)
    frequencies = 10_000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / -64)
    bound = 1e-15 * max(position, 100)
    for j, frequency in enumerate(frequencies.tolist()):
        expected = exact(position, frequency)
        assert abs(c[0, j].item() - expected[0]) <= bound
        assert abs(s[0, j].item() - expected[1]) <= bound


def test_scores_depend_on_distance_only_at_ten_million() -> None:
    """The same pair of vectors 1,000 tokens apart, at the start and at position ten million, in fp32."""
    q, k = torch.randn(64), torch.randn(64)
    scores = []
    for start in (0, 10_000_000):
        q_cos, q_sin = rope_angles(torch.tensor(start + 1000), 64, 10_000.0)
        k_cos, k_sin = rope_angles(torch.tensor(start), 64, 10_000.0)
        scores.append(rotate(q, q_cos, q_sin) @ rotate(k, k_cos, k_sin))
    assert abs(scores[0] - scores[1]).item() < 1e-5 * q.norm().item() * k.norm().item()


def test_fp32_angles_would_fail_this() -> None:
    """What the test above guards against: fp32 angles are off by radians' tenths at ten million."""
    frequency = 10_000.0 ** (torch.arange(0, 64, 2) / -64)
    wrong = (torch.tensor(10_001_000.0) * frequency) - (torch.tensor(10_000_000.0) * frequency)
    right = 1000.0 * frequency.double()
    off = (wrong.double() - right + pi).remainder(2 * pi) - pi
    assert off.abs().max() > 0.1


def test_rotation_pairs_halves_and_keeps_length() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    c, s = rope_angles(torch.arange(3), 8, 100.0)
    y = rotate(x, c, s)
    torch.testing.assert_close(y[:, 1], x[:, 1] * c[:, 1] - x[:, 5] * s[:, 1])
    torch.testing.assert_close(y[:, 5], x[:, 1] * s[:, 1] + x[:, 5] * c[:, 1])
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    assert rotate(x.bfloat16(), c, s).dtype == torch.bfloat16
