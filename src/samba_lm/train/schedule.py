"""The learning rate as a function of the step: linear warm-up, then a cosine down to a fraction of the peak."""

from __future__ import annotations

import math


def warmup_steps(steps: int, fraction: float) -> int:
    """Steps of linear warm-up in a run of ``steps``: the fraction, rounded, at least 1 and below ``steps``."""
    if fraction == 0:
        return 0
    return max(1, min(round(fraction * steps), steps - 1))


def learning_rate(step: int, *, steps: int, peak: float, warmup_fraction: float, min_ratio: float) -> float:
    """Learning rate of the ``step``-th update, counted from 0, of a run of ``steps``.

    Warm-up climbs in equal parts and its last step has the peak; the cosine ends at ``min_ratio * peak`` on the last
    step. After that (a run that went on) it stays there.
    """
    warmup = warmup_steps(steps, warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step + 1 - warmup) / max(1, steps - warmup))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
