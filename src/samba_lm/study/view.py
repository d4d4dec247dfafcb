"""What people see of a study on its way: a live table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from samba_lm.study.plan import Estimates, Job, Plan
from samba_lm.study.record import Record
from samba_lm.study.runner import View
from samba_lm.train.progress import count, duration

PLAIN_EVERY = 30.0
"""Seconds between two plain lines about a running job."""
WIDE = 84
"""Columns from which on all figures are shown."""


@dataclass
class Running:
    """What is known of a job on its way."""

    job: Job
    place: str
    began: float
    estimate: float | None
    state: str = "starting"
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    told: float = 0.0

    def note(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "training":
                self.state, self.step = "training", event["step"]
            case "step":
                self.state, self.step = "training", event["step"]
                self.loss, self.tokens_per_s = event["loss"], event["tokens_per_s"]
            case "evaluating":
                share = event["done"] / max(1, event["total"])
                self.state = f"{event['name']} {share:.0%}"

    @property
    def progress(self) -> str:
        return f"step {self.step}/{self.job.steps}" if self.state == "training" else self.state

    def left(self) -> float | None:
        """Seconds to go, about: as estimated, or from the steps' speed."""
        passed = time.monotonic() - self.began
        if self.estimate is not None:
            return max(0.0, self.estimate - passed)
        if self.state != "training" or not self.tokens_per_s:
            return None
        return (self.job.steps - self.step) * self.job.recipe.train.tokens_per_step / self.tokens_per_s


class StudyView(View):
    """What both views share: who runs, what is done."""

    def __init__(self, console: Console, workers: int) -> None:
        self.console = console
        self.workers = workers
        self.running: dict[str, Running] = {}
        self.summary = ""

    def planned(self, plan: Plan, records: Mapping[str, Record], estimates: Estimates) -> None:
        self.summary = summary(plan, records, estimates, self.workers)

    def started(self, job: Job, place: str, estimate: float | None) -> None:
        moment = time.monotonic()
        self.running[job.key] = Running(job, place, moment, estimate, told=moment)

    def event(self, job: Job, event: Mapping[str, Any]) -> None:
        self.running[job.key].note(event)

    def ended(self, job: Job, record: Record | None) -> None:
        running = self.running.pop(job.key)
        seconds = duration(time.monotonic() - running.began)
        self.say(f"{job.key} ({seconds}): {ending(record)}")

    def message(self, text: str) -> None:
        self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        # A log line stays one line; on a terminal words are not torn apart.
        self.console.print(text, soft_wrap=not self.console.is_terminal, highlight=False, markup=False)

    def __enter__(self) -> StudyView:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class PlainStudyView(StudyView):
    """A line for each beginning and end, and now and then one between."""

    def started(self, job: Job, place: str, estimate: float | None) -> None:
        super().started(job, place, estimate)
        about = "" if estimate is None else f", about {duration(estimate)}"
        self.say(f"{job.key}: begins on {place}, {job.steps} steps{about}")

    def event(self, job: Job, event: Mapping[str, Any]) -> None:
        super().event(job, event)
        running = self.running[job.key]
        if time.monotonic() - running.told > PLAIN_EVERY:
            running.told = time.monotonic()
            self.say(f"{job.key}: {'  '.join(figures(running))}")

    def ended(self, job: Job, record: Record | None) -> None:
        super().ended(job, record)

    def planned(self, plan: Plan, records: Mapping[str, Record], estimates: Estimates) -> None:
        super().planned(plan, records, estimates)
        self.say(self.summary)


class LiveStudyView(StudyView):
    """The running jobs as a table, redrawn in place; what ended scrolls away above it."""

    def __init__(self, console: Console, workers: int) -> None:
        super().__init__(console, workers)
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self.render)

    def __enter__(self) -> StudyView:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def render(self) -> RenderableType:
        """The whole view, for whatever width the console has now."""
        running = list(self.running.values())
        head = Text(self.summary, style="bold", overflow="fold")
        if not running:
            return head
        wide = self.console.width >= WIDE
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("run", "", *(("on",) if wide else ()), "state", "loss", *(("tok/s",) if wide else ()), "left"):
            right = heading in ("loss", "tok/s", "left")
            table.add_column(heading, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        for each in running:
            left = each.left()
            job = each.job
            table.add_row(
                *(job.run, f"{job.stage} {job.lr:g}" + (f" s{job.seed}" if job.seed else "")),
                *((each.place,) if wide else ()),
                each.progress,
                "" if each.loss is None else f"{each.loss:.4f}",
                *(("" if each.tokens_per_s is None else count(each.tokens_per_s),) if wide else ()),
                "" if left is None else duration(left),
            )
        return Group(head, table)


def study_view(console: Console, workers: int) -> StudyView:
    """The live view when ``console`` is a terminal, plain lines otherwise."""
    return LiveStudyView(console, workers) if console.is_terminal else PlainStudyView(console, workers)


def figures(running: Running) -> list[str]:
    """The figures of a running job as short words."""
    words = [running.progress]
    if running.loss is not None:
        words.append(f"loss {running.loss:.4f}")
    if running.tokens_per_s is not None:
        words.append(f"{count(running.tokens_per_s)} tok/s")
    left = running.left()
    return words if left is None else [*words, f"{duration(left)} left"]


def ending(record: Record | None) -> str:
    """How a job ended, in words."""
    if record is None:
        return "interrupted, to be continued"
    if record.status in ("failed", "diverged"):
        return f"{record.status}: {record.reason}"
    words = [] if record.val_loss is None else [f"validation {record.val_loss:.4f}"]
    if record.train_loss is not None:
        words.append(f"loss {record.train_loss:.4f}")
    if record.tokens_per_s is not None:
        words.append(f"{count(record.tokens_per_s)} tok/s")
    return ", ".join(["done", *words])


def summary(plan: Plan, records: Mapping[str, Record], estimates: Estimates, workers: int) -> str:
    """``12 of 61 jobs done, 1 diverged, 8 wait for a sweep, about 35m left``."""
    settled = [job for job in plan.jobs if job.settled(records.get(job.key))]
    diverged = sum(records[job.key].status == "diverged" for job in settled)
    rest = [job for job in plan.jobs if job not in settled]
    failed = sum(
        record.status == "failed" and record.fingerprint == job.fingerprint
        for job in rest
        if (record := records.get(job.key)) is not None
    )
    waiting = [job for each in plan.waiting for job in each.jobs]
    words = [f"{len(settled) - diverged} of {len(plan.jobs) + len(waiting)} jobs done"]
    words += [f"{number} {what}" for number, what in ((diverged, "diverged"), (failed, "failed")) if number]
    if waiting:
        words.append(f"{len(waiting)} wait{'s' if len(waiting) == 1 else ''} for a sweep")
    left = [estimates.seconds(job) for job in (*rest, *waiting)]
    known = [seconds for seconds in left if seconds is not None]
    if left and len(known) == len(left):
        words.append(f"about {duration(max(sum(known) / workers, *known))} left")
    return ", ".join(words)
