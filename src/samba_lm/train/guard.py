"""Steps whose loss or gradient stands out are no good for a model: what to do about such spikes.

A step stands out when its loss, or its gradient's norm, is more than ``spike_factor`` standard deviations above the
median of the last accepted steps. The deviation is made of the median too (1.4826 times the median absolute deviation),
so that a spike that was accepted does not widen it; it is at least a hundredth of the median, and nothing that is not
above the largest accepted value stands out.

What the guard knows is data in a checkpoint, and what it looks at are sums over all processes, so that all of them, and
a run that was continued, decide the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from samba_lm.train.recipe import TrainSection

LEAST = 16
"""Accepted steps before any is refused."""
FLOOR = 0.01
"""Standard deviation at the least, as a fraction of the median."""


class Limits(NamedTuple):
    """Largest loss (nats) and gradient norm of a step that is accepted."""

    loss: float
    grad_norm: float

    def hold(self, loss: float, grad_norm: float) -> bool:
        """Whether a step is within them; what is not a number is not."""
        return loss <= self.loss and grad_norm <= self.grad_norm and math.isfinite(loss) and math.isfinite(grad_norm)


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers, as plain data. A run without guard stays at the defaults."""

    losses: tuple[float, ...] = ()
    """Of the last accepted steps, oldest first."""
    grad_norms: tuple[float, ...] = ()
    in_a_row: int = 0
    """Steps refused since one was accepted; where the run goes back, since a checkpoint was made."""
    skipped: int = 0
    """Steps of the whole run whose update was left out."""
    rollbacks: int = 0
    """Times that the run went back."""
    passed: int = 0
    """Batches passed over: step n reads batch n + passed."""


class Guard:
    """Tells which steps stand out."""

    def __init__(self, settings: TrainSection) -> None:
        assert settings.spike is not None
        self.goes_back = settings.spike == "rollback"
        self.factor, self.window, self.most = settings.spike_factor, settings.spike_window, settings.spike_limit

    def limits(self, state: GuardState) -> Limits | None:
        """Those of the next step. None: nothing is refused, and what is not finite ends the run, because no step was
        accepted yet or ``spike_limit`` were refused in a row."""
        if not state.losses or state.in_a_row >= self.most:
            return None
        if len(state.losses) < min(LEAST, self.window):
            return Limits(math.inf, math.inf)
        return Limits(self._limit(state.losses), self._limit(state.grad_norms))

    def accept(self, state: GuardState, loss: float, grad_norm: float) -> GuardState:
        """After a step within the limits."""
        # A new level, where too many were skipped before it: what was tells nothing of it.
        anew = not self.goes_back and state.in_a_row >= self.most
        losses, norms = ((), ()) if anew else (state.losses, state.grad_norms)
        return replace(
            state,
            losses=(*losses, loss)[-self.window :],
            grad_norms=(*norms, grad_norm)[-self.window :],
            in_a_row=state.in_a_row if self.goes_back else 0,
        )

    def skip(self, state: GuardState) -> GuardState:
        """After a step whose update was left out."""
        return replace(state, in_a_row=state.in_a_row + 1, skipped=state.skipped + 1)

    def go_back(self, state: GuardState, there: GuardState, batches: int) -> GuardState:
        """After the run went back from ``state`` to a checkpoint's, which ``batches`` were read since."""
        return replace(there, in_a_row=state.in_a_row + 1, rollbacks=state.rollbacks + 1, passed=state.passed + batches)

    def warning(self, state: GuardState) -> str:
        """A further sentence after the last refusal in a row, else nothing."""
        if state.in_a_row < self.most:
            return ""
        until = ", until the next checkpoint" if self.goes_back else ""
        return f" This was number {state.in_a_row} in a row: what comes now is taken as it is{until}."

    def saved(self, state: GuardState) -> GuardState:
        """As a checkpoint is made."""
        return replace(state, in_a_row=0) if self.goes_back else state

    def _limit(self, values: Sequence[float]) -> float:
        middle = median(values)
        deviation = 1.4826 * median(abs(value - middle) for value in values)
        return max(middle + self.factor * max(deviation, FLOOR * abs(middle)), *values)


def spike(step: int, loss: float, grad_norm: float, limits: Limits) -> str:
    """What stands out, for people."""
    return (
        f"Step {step} stands out, with loss {loss:.4f} (limit {limits.loss:.4f}) and gradient norm {grad_norm:.3g} "
        f"(limit {limits.grad_norm:.3g})"
    )
