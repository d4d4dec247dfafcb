"""What people see of a run: a live view on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
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
        self.pace = Pace()

    def started(self, plan: Plan) -> None:
        self.plan = plan
        self._print(headline(plan))

    def step(self, record: StepRecord) -> None:
        assert self.plan is not None
        self.pace.step(record, self.plan.tokens_per_step)
        due = record.step % self.every == 0 or record.step == self.plan.steps
        if due or record.val_loss is not None:
            words = figures(record, validation(record), self.pace, self.plan)
            self._print(f"step {record.step}/{self.plan.steps}  " + "  ".join(words))

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
        self.validation: list[str] = []
        self.pace = Pace()
        self.curve: deque[tuple[int, float]] = deque(maxlen=4096)
        self.checkpoint: str | None = None
        self.live = Live(console=console, auto_refresh=False, get_renderable=self.render)

    def started(self, plan: Plan) -> None:
        self.plan = plan
        self.live.auto_refresh = True
        self.live.start()

    def step(self, record: StepRecord) -> None:
        assert self.plan is not None
        self.record = record
        self.pace.step(record, self.plan.tokens_per_step)
        self.curve.append((record.step, record.loss))
        if record.val_loss is not None:
            self.validation = validation(record)

    def saved(self, step: int, folder: Path) -> None:
        self.checkpoint = str(folder)

    def returned(self, step: int) -> None:
        while self.curve and self.curve[-1][0] > step:
            self.curve.pop()

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
        if self.record is not None:
            words = [
                f"step {step}/{self.plan.steps}",
                *figures(self.record, self.validation, self.pace, self.plan),
            ]
            rows += [Text(line) for line in pack(words, self.console.width)]
            if self.console.encoding.lower().startswith("utf"):
                rows.append(
                    Text(
                        sparkline(
                            [loss for _, loss in self.curve if math.isfinite(loss)], min(60, self.console.width - 1)
                        ),
                        style="cyan",
                    )
                )
        if self.checkpoint is not None:
            rows.append(Text(f"saved {self.checkpoint}", style="dim", overflow="fold"))
        return Group(*rows)


class Pace:
    """How fast a run goes, smoothed."""

    def __init__(self) -> None:
        self.speed: float | None = None
        """Tokens a second, of all processes."""
        self.waiting: float | None = None
        """Share of a step's time that the main process waits for data, 0 to 1; None: not measured."""

    def step(self, record: StepRecord, tokens: int) -> None:
        """A step of ``tokens`` more."""
        self.speed = smooth(self.speed, record.tokens_per_s)
        if record.data_wait_s is not None:
            self.waiting = smooth(self.waiting, record.data_wait_s * record.tokens_per_s / tokens)


def headline(plan: Plan) -> str:
    """``Training samba-tiny (1.2M parameters) on cpu, 4 processes (2 replicas x 2 shards)``."""
    text = f"Training {plan.name} ({count(plan.parameters)} parameters) on {plan.device}"
    if plan.world == 1:
        return text
    words = {"replicate": "replicas", "shard": "shards", "context": "parts of a row"}
    shares = " x ".join(f"{size} {words.get(name, name)}" for name, size in plan.mesh.items() if size > 1)
    return f"{text}, {plan.world} processes" + (f" ({shares})" if shares else "")


def validation(record: StepRecord) -> list[str]:
    """The validation losses as short words."""
    if record.val_losses:
        return [f"val {name} {loss:.4f}" for name, loss in record.val_losses.items()]
    return [] if record.val_loss is None else [f"val {record.val_loss:.4f}"]


def figures(record: StepRecord, validated: list[str], pace: Pace, plan: Plan) -> list[str]:
    """The figures of a step as short words."""
    assert pace.speed is not None
    words = [f"loss {record.loss:.4f}", *validated]
    if record.length is not None and record.length != plan.length:
        words.append(f"rows of {record.length:,}")
    words += [f"lr {record.lr:.2e}", f"norm {record.grad_norm:.2f}", f"{count(pace.speed)} tok/s"]
    if plan.world > 1:
        words.append(f"{count(pace.speed / plan.world)} tok/s each")
    if record.mfu is not None:
        words.append(f"MFU {record.mfu:.1%}")
    if record.memory_peak is not None:
        words.append(f"mem {count(record.memory_peak, 'KMGT')}B")
    if pace.waiting is not None and pace.waiting >= 0.005:
        words.append(f"data wait {pace.waiting:.0%}")
    if record.skipped:
        words.append(f"skipped {record.skipped}")
    if record.rollbacks:
        words.append(f"went back {record.rollbacks}x")
    words.append(f"ETA {duration((plan.steps - record.step) * plan.tokens_per_step / pace.speed)}")
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
