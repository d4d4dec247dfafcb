"""What people see of a run: a live view on a terminal, plain lines everywhere else."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from samba_lm.train.observer import Observer, Plan, StepRecord

BLOCKS = "▁▂▃▄▅▆▇█"
SMOOTHING = 0.9
"""Weight of the past in the shown speed; files hold the raw figures."""


def progress_observer(console: Console, log_every: int) -> Observer:
    """The live view when ``console`` is a terminal, plain lines otherwise."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console, log_every)


class PlainProgress(Observer):
    """A line every ``every`` steps, for logs and pipes."""

    def __init__(self, console: Console, every: int) -> None:
        self.console = console
        self.every = every
        self.plan: Plan | None = None
        self.speed: float | None = None

    def started(self, plan: Plan) -> None:
        self.plan = plan
        self._print(headline(plan))

    def step(self, record: StepRecord) -> None:
        assert self.plan is not None
        self.speed = smooth(self.speed, record.tokens_per_s)
        due = record.step % self.every == 0 or record.step == self.plan.steps
        if due or record.val_loss is not None:
            left = (self.plan.steps - record.step) * self.plan.tokens_per_step / self.speed
            self._print(
                f"step {record.step}/{self.plan.steps}  "
                + "  ".join(figures(record, record.val_loss, self.speed, left))
            )

    def saved(self, step: int, folder: Path) -> None:
        self._print(f"saved {folder}")

    def message(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        # Not wrapped: a log line stays one line.
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveProgress(Observer):
    """A bar, the curve of the loss and the figures, redrawn in place; folds itself to narrow terminals."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.plan: Plan | None = None
        self.record: StepRecord | None = None
        self.val_loss: float | None = None
        self.speed: float | None = None
        self.curve: deque[float] = deque(maxlen=4096)
        self.checkpoint: str | None = None
        self.live = Live(console=console, auto_refresh=False, get_renderable=self.render)

    def started(self, plan: Plan) -> None:
        self.plan = plan
        self.live.auto_refresh = True
        self.live.start()

    def step(self, record: StepRecord) -> None:
        self.record = record
        self.speed = smooth(self.speed, record.tokens_per_s)
        self.curve.append(record.loss)
        if record.val_loss is not None:
            self.val_loss = record.val_loss

    def saved(self, step: int, folder: Path) -> None:
        self.checkpoint = str(folder)

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def stopped(self) -> None:
        self.live.stop()

    def render(self) -> RenderableType:
        """The whole view, for whatever width the console has now."""
        if self.plan is None:
            return Text()
        step = self.record.step if self.record else self.plan.first_step
        bar = Table.grid(expand=True)  # a bar alone does not end its line
        bar.add_row(ProgressBar(total=self.plan.steps, completed=step))
        rows: list[RenderableType] = [Text(headline(self.plan), style="bold"), bar]
        if self.record is not None and self.speed is not None:
            left = (self.plan.steps - step) * self.plan.tokens_per_step / self.speed
            words = [
                f"step {step}/{self.plan.steps}",
                *figures(self.record, self.val_loss, self.speed, left),
            ]
            rows += [Text(line) for line in pack(words, self.console.width)]
            if self.console.encoding.lower().startswith("utf"):
                rows.append(Text(sparkline(list(self.curve), min(60, self.console.width - 1)), style="cyan"))
        if self.checkpoint is not None:
            rows.append(Text(f"saved {self.checkpoint}", style="dim", overflow="fold"))
        return Group(*rows)


def headline(plan: Plan) -> str:
    """``Training samba-tiny (1.2M parameters) on cpu``."""
    return f"Training {plan.name} ({count(plan.parameters)} parameters) on {plan.device}"


def figures(record: StepRecord, val_loss: float | None, speed: float, left: float) -> list[str]:
    """The figures of a step as short words."""
    words = [f"loss {record.loss:.4f}"]
    if val_loss is not None:
        words.append(f"val {val_loss:.4f}")
    words += [f"lr {record.lr:.2e}", f"norm {record.grad_norm:.2f}", f"{count(speed)} tok/s"]
    if record.mfu is not None:
        words.append(f"MFU {record.mfu:.1%}")
    words.append(f"ETA {duration(left)}")
    return words


def pack(words: list[str], width: int) -> list[str]:
    """The words in lines of at most ``width`` columns, none torn apart."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 2 + len(word) <= width:
            lines[-1] += "  " + word
        else:
            lines.append(word)
    return lines


def smooth(past: float | None, value: float) -> float:
    """Exponential moving average."""
    return value if past is None else SMOOTHING * past + (1 - SMOOTHING) * value


def sparkline(values: list[float], width: int) -> str:
    """The values as a row of blocks, each the mean of an equal share of them; low is good and drawn low."""
    if not values or width < 1:
        return ""
    cells = min(width, len(values))
    edges = [i * len(values) // cells for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def count(number: float, units: str = "KMBT") -> str:
    """``950``, ``12.3K``, ``4.56M``, ``1.20B``: three digits, and one of ``units``: "KMGT" for bytes and FLOPs."""
    for unit in ("", *units):
        if number < 999.5 or unit == units[-1]:
            break
        number /= 1000
    digits = 0 if not unit or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """``45s``, ``3m07s``, ``2h05m``, ``3d04h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
