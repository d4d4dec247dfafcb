"""How a demo tells what it does, stage by stage, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.text import Text


class Story:
    """Says what is done at every step, and how long each stage took."""

    def __init__(self, console: Console, stages: int) -> None:
        self.console, self.stages, self.count = console, stages, 0
        self.began = time.perf_counter()
        self.times: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def stage(self, name: str, text: str) -> Callable[[], None]:
        """Announce a stage; call what is returned at its end."""
        self.count += 1
        start = self.elapsed
        self.console.print(f"\n[bold]{self.count}/{self.stages}[/bold] {text}", highlight=False)

        def done() -> None:
            self.times[name] = self.elapsed - start

        return done

    def say(self, text: str) -> None:
        """A line below the stage's, folded behind its margin."""
        for line in Text.from_markup(text).wrap(self.console, max(20, self.console.width - 4)):
            self.console.print("    ", line, sep="", highlight=False)
