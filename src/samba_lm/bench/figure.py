"""One measured number, its bar, and who did the work: what every benchmark gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OURS = "samba-lm"


@dataclass(frozen=True)
class Figure:
    """One measured number. ``bar``: what it should reach, "at most" or "at least" as ``low_is_good`` says."""

    name: str
    value: float | None
    """None: not measured, and ``note`` says why."""
    unit: str
    bar: float | None = None
    low_is_good: bool = True
    stretch: float | None = None
    """A harder bar, for what was hoped for."""
    goal: float | None = None
    """The hardest one."""
    by: str = OURS
    """Whose implementation did the work."""
    note: str = ""
    """"quoted" for another run's figure; the reason where nothing was measured."""
    check: bool = False
    """A comparison that must reach its bar, and not a speed that may miss it."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What else belongs to it: bytes, FLOPs, shares of the ceilings, spread, errors by tensor."""

    @property
    def met(self) -> bool | None:
        """Whether the bar was reached; None without one. What was not measured reached nothing."""
        return None if self.bar is None else self._reaches(self.bar)

    @property
    def verdict(self) -> str:
        """The hardest bar that was reached, in a word: "goal", "stretch", "met" or "MISSED"; "" without a bar."""
        for word, bar in (("goal", self.goal), ("stretch", self.stretch), ("met", self.bar)):
            if bar is not None and self._reaches(bar):
                return word
        return "" if self.bar is None else "MISSED"

    @property
    def failed(self) -> bool:
        """Whether this is ours, and is missing or a check that did not pass. A speed below its bar is a result."""
        return self.by == OURS and (self.value is None or (self.check and not self.met))

    def record(self) -> dict[str, object]:
        """Plain data for JSON; the optional fields only where they say something."""
        always: dict[str, object] = {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "bar": self.bar,
            "low_is_good": self.low_is_good,
            "met": self.met,
        }
        more: dict[str, object] = {
            "check": self.check or None,
            "stretch": self.stretch,
            "goal": self.goal,
            "note": self.note,
            "facts": dict(self.facts),
        }
        said = {key: value for key, value in more.items() if value not in (None, "", {})}
        return {**always, **({} if self.by == OURS else {"by": self.by}), **said}

    def _reaches(self, bar: float) -> bool:
        if self.value is None:
            return False
        return self.value <= bar if self.low_is_good else self.value >= bar
