"""The learning rate as a function of the step: linear warm-up, then one of four ways down to a fraction of the peak."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "wsd", "linear", "constant"]
Decay = Literal["sqrt", "linear"]


def warmup_steps(steps: int, fraction: float) -> int:
    """Steps of linear warm-up in a run of ``steps``: the fraction, rounded, at least 1 and below ``steps``."""
    if fraction == 0:
        return 0
    return max(1, min(round(fraction * steps), steps - 1))


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    warmup_fraction: float,
    min_ratio: float,
    schedule: Schedule = "cosine",
    decay_fraction: float = 0.2,
    decay: Decay = "sqrt",
) -> float:
    """Learning rate of the ``step``-th update, counted from 0, of a run of ``steps``.

    Warm-up climbs in equal parts and its last step has the peak. From there to ``min_ratio * peak`` on the last step
    leads half a cosine, or a line; "wsd" (warm-up, stable, decay: arXiv:2405.18392) stays at the peak until the last
    ``decay_fraction`` of the steps and goes down in them, as 1 - sqrt or a line; "constant" stays. After the last step
    (a run that went on) the rate stays what it was there.
    """
    warmup = warmup_steps(steps, warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    falling = steps - warmup
    if schedule == "wsd":
        falling = min(falling, max(1, round(decay_fraction * steps)))
    done = max(0.0, min(1.0, (step + 1 - (steps - falling)) / max(1, falling)))
    if schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule == "wsd" and decay == "sqrt":
        left = 1 - math.sqrt(done)
    else:
        left = 1 - done
    return peak * (min_ratio + (1 - min_ratio) * left)
