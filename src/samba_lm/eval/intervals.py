"""How far a share that was counted, or a mean, may be from the true one."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution at 97.5%


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a probability, of which ``right`` of ``total`` independent tries were right (Wilson, 1927).

    Unlike mean +- error it stays within 0 and 1 and does not shrink to a point where all were right. (0, 1) without
    tries.
    """
    if not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no count")
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, _Z * _Z / total
    centre = (share + z2 / 2) / (1 + z2)
    reach = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    # At either end the formula's own value is exact, but for rounding.
    return 0.0 if right == 0 else max(0.0, centre - reach), 1.0 if right == total else min(1.0, centre + reach)


@dataclass(frozen=True)
class Mean:
    """A mean of ``count`` values and the ends of its 95% interval; NaN where there are too few."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def reach(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Mean:
    """The mean of independent values, and its 95% interval by Student's t: wide where they are few."""
    count = len(values)
    if not count:
        return Mean(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, math.nan, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    reach = student(count - 1) * math.sqrt(variance / count)
    return Mean(mean, mean - reach, mean + reach, count)


def grouped_interval(values: Sequence[float], groups: Sequence[Hashable]) -> Mean:
    """The mean of values that are independent only between groups, such as questions about one text: Student's t over
    the groups (the ratio estimator's variance). Alone in its group each, it is :func:`mean_interval`."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    sizes = [len(some) for some in members.values()]
    return means_interval([math.fsum(some) / len(some) for some in members.values()], sizes)


def means_interval(means: Sequence[float], sizes: Sequence[int]) -> Mean:
    """:func:`grouped_interval` of groups of which only the ``means`` and the ``sizes`` are known."""
    number, count = len(means), sum(sizes)
    mean = math.fsum(mean * size for mean, size in zip(means, sizes, strict=True)) / count if count else math.nan
    if number < 2:
        return Mean(mean, math.nan, math.nan, count)
    squares = math.fsum(((value - mean) * size) ** 2 for value, size in zip(means, sizes, strict=True))
    reach = student(number - 1) * math.sqrt(squares * number / (number - 1)) / count
    return Mean(mean, mean - reach, mean + reach, count)


@functools.cache
def student(degrees: int) -> float:
    """How many standard errors a 95% interval reaches with so many degrees of freedom: 12.7 with 1, 1.96 with many."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom are none")
    if degrees > 10_000:
        return _Z
    low, high = 0.0, 100.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """The probability that Student's t is within -t .. t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine2 = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(degrees // 2):
        total += term
        term *= cosine2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inner = math.sin(angle) * total
    return 2 / math.pi * (angle + inner) if odd else inner
