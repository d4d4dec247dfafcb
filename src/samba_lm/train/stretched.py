"""Training on short rows as if they were long: recurrences that forget faster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from samba_lm.mixers.mamba import Selection
from samba_lm.model import SambaLM


@contextmanager
def stretched(model: SambaLM, factor: float) -> Iterator[None]:
    """While this lasts, every Mamba state decays ``factor`` times as fast, forward and backward.

    After L tokens as much is left of a state as otherwise after ``factor`` x L: a row of 4,096 tokens teaches what to
    hold for 64 times as many. The decay is exp(Delta A) with A = -exp(A_log), so that log(factor) is added to A_log;
    its gradient is that of the shifted value, which is the parameter's own.
    """
    if factor == 1:
        yield
        return
    logs = [module.A_log for module in model.modules() if isinstance(module, Selection)]
    before = [log.data for log in logs]
    try:
        for log in logs:
            log.data = log.data + math.log(factor)
        yield
    finally:
        for log, data in zip(logs, before, strict=True):
            log.data = data
