"""Runs a study's jobs on several workers at once, unattended; whatever becomes of one, the others go on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from samba_lm.errors import UserError
from samba_lm.files import read_json, write_text
from samba_lm.study.plan import Estimates, Job, Plan, Planner, now, priority
from samba_lm.study.process import STOPPED, Happening, Place, WorkerProcess
from samba_lm.study.record import Record, read_record, read_records, record_path
from samba_lm.study.study import Study
from samba_lm.validation import explain

STUDY_FILE = "study.json"
FORMAT = "samba-lm study"
MARGIN = 1.1
"""With --seconds a job is started where this many times its estimated time is left."""
PATIENCE = 120.0
"""Seconds that workers get to save a checkpoint when they are asked to stop."""
LOCK_PATIENCE = 15.0
"""Seconds to wait for the workers of a command that was killed: they notice, save and end."""


class View:
    """Does nothing; override to show what happens."""

    def planned(self, plan: Plan, records: Mapping[str, Record], estimates: Estimates) -> None:
        """What there is to do changed."""

    def started(self, job: Job, place: str, estimate: float | None) -> None:
        """A worker was given a job."""

    def event(self, job: Job, event: Mapping[str, Any]) -> None:
        """A worker told of its job."""

    def ended(self, job: Job, record: Record | None) -> None:
        """A job is done with; without a record it was interrupted."""

    def message(self, text: str) -> None:
        """A sentence for people."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    bad: tuple[Record, ...]
    """Failed and diverged jobs of the plan."""
    left: tuple[Job, ...]
    """Jobs not done."""
    plan: Plan
    interrupted: int | None
    """The signal that ended the command early."""
    out_of_time: bool


@dataclass
class Runner:
    """Does what a planner plans."""

    planner: Planner
    places: Sequence[Place]
    """A worker for each."""
    provenance: Mapping[str, object]
    view: View = field(default_factory=View)
    seconds: float | None = None
    """Time for it all; jobs that would not end in it are not begun, those that still run then are stopped, saved."""

    def __post_init__(self) -> None:
        self.out = self.planner.out
        self.happenings: SimpleQueue[Happening] = SimpleQueue()
        self.records: dict[str, Record] = {}
        self.attempted: set[str] = set()
        self.asked: list[int] = []
        """Signals that came."""
        self.late = False
        self.answered = False
        """Whether a worker has ever told anything: where none can, what follows would only fail too."""
        self.broken = False
        self.ending = False

    def run(self) -> Outcome:
        """Do all that can be done. Raises UserError when the folder is another's or in use."""
        began = time.monotonic()
        with study_lock(self.out, self.view) as lock, self._signals():
            self.records = read_records(self.out)
            before = read_study_file(self.out).jobs if (self.out / STUDY_FILE).exists() else {}
            command = self.provenance.get("command")
            words = [str(word) for word in command] if isinstance(command, list) else []
            self.file = StudyFile(study=self.planner.study, command=words, jobs=before)
            workers = [
                WorkerProcess(place, self.out / ".workers" / f"{number}.log", self.happenings, (lock,))
                for number, place in enumerate(self.places)
            ]
            try:
                plan = self._work(workers, began)
            finally:
                self._end(workers)
        bad = [self.records[job.key] for job in plan.jobs if self._is_bad(job)]
        settled = {job.key for job in plan.jobs if job.settled(self.records.get(job.key))}
        left = [job for job in plan.jobs if job.key not in settled and not self._is_bad(job)]
        return Outcome(tuple(bad), tuple(left), plan, self.asked[0] if self.asked else None, self.late)

    def _is_bad(self, job: Job) -> bool:
        record = self.records.get(job.key)
        same = record is not None and record.fingerprint == job.fingerprint
        return same and record is not None and record.status in ("failed", "diverged")

    def _work(self, workers: Sequence[WorkerProcess], began: float) -> Plan:
        plan = self._replan()
        while True:
            left = None if self.seconds is None else self.seconds - (time.monotonic() - began)
            self.late = self.late or (left is not None and left <= 0)
            if self.asked or (left is not None and left <= 0):
                return plan
            if not self.broken:
                self._give_jobs(workers, plan, left)
            if not any(worker.job for worker in workers):
                return plan
            with contextlib.suppress(Empty):
                if self._happened(self.happenings.get(timeout=0.2)):
                    plan = self._replan()

    def _replan(self) -> Plan:
        plan = self.planner.plan(self.records)
        self.file.note(plan)
        self.file.write(self.out)
        self.view.planned(plan, self.records, Estimates(self.records))
        return plan

    def _give_jobs(self, workers: Sequence[WorkerProcess], plan: Plan, left: float | None) -> None:
        estimates = Estimates(self.records)
        ready = [job for job in plan.jobs if job.key not in self.attempted and not self._settled(job)]
        ready.sort(key=lambda job: -priority(job, plan, estimates))
        for worker in workers:
            if worker.job is not None:
                continue
            job = next((job for job in ready if self._fits(estimates.seconds(job), left)), None)
            if job is None:
                self.late = self.late or bool(ready)
                return
            ready.remove(job)
            self.attempted.add(job.key)
            self.view.started(job, worker.place.name, estimates.seconds(job))
            worker.give(job, self.out, self.provenance)

    def _settled(self, job: Job) -> bool:
        return job.settled(self.records.get(job.key))

    @staticmethod
    def _fits(estimate: float | None, left: float | None) -> bool:
        return left is None or estimate is None or MARGIN * estimate <= left

    def _happened(self, happening: Happening) -> bool:
        """Take note of what a worker told; whether a job ended."""
        worker, job = happening.worker, happening.worker.job
        if happening.process is not worker.process:
            return False
        if happening.event is None:
            worker.retire()
        if job is None:
            return False
        event = happening.event
        self.answered = self.answered or event is not None
        if event is not None and event["event"] != "ended":
            self.view.event(job, event)
            return False
        if event is None:
            code = happening.process.returncode
            # One that is asked to stop while it still imports ends by the signal itself.
            record = None if self.ending or code == STOPPED else self._crashed(worker, job, code)
            self.broken = self.broken or not self.answered
        else:
            record = read_record(record_path(self.out, job.key))
            if record.status == "failed":
                worker.retire()
        worker.job = None
        if record is not None:
            self.records[job.key] = record
            if event is not None:
                record_path(self.out, job.key).with_suffix(".log").unlink(missing_ok=True)
        self.view.ended(job, record)
        return True

    def _crashed(self, worker: WorkerProcess, job: Job, code: int) -> Record:
        """The record of a job whose process ended without a word; what it printed is kept beside it."""
        path = record_path(self.out, job.key)
        record = read_record(path) if path.exists() else None
        if record is None or not job.trained(record):
            record = job.new_record(self.provenance)
        record.status, record.reason, record.finished = "failed", worker.last_words(code), now()
        record.write(self.out)
        shutil.copyfile(worker.log, path.with_suffix(".log"))
        return record

    def _end(self, workers: Sequence[WorkerProcess]) -> None:
        """Stop what still runs, so that it can be continued, and wait for it."""
        self.ending = True
        running = [worker for worker in workers if worker.job is not None]
        if running:
            self.view.message(f"Stopping {len(running)} job(s), each after its step, with a checkpoint.")
        idle = [worker.process for worker in workers if worker.job is None and worker.process is not None]
        for worker in workers:
            if worker.job is None:
                worker.retire()
        for worker in running:
            worker.signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while any(worker.process is not None for worker in running) and len(self.asked) < 2:
            with contextlib.suppress(Empty):
                self._happened(self.happenings.get(timeout=0.2))
            if time.monotonic() > deadline:
                break
        for worker in running:
            worker.signal(signal.SIGKILL)
            worker.retire()
        for process in idle:
            process.wait(PATIENCE)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take the first Ctrl-C, SIGTERM or SIGHUP as a request to stop; the second kills the workers."""

        def note(number: int, frame: FrameType | None) -> None:
            self.asked.append(number)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def study_lock(out: Path, view: View) -> Iterator[int]:
    """Hold a study's folder; yields the lock's file descriptor, which workers inherit, so that it is free only when the
    last of them is gone. Raises UserError when another command holds it, or the folder is no study's."""
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"Cannot write in {out}: {error.strerror}. Choose another folder with --out.") from None
    try:
        deadline = time.monotonic() + LOCK_PATIENCE
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another command works in {out}: wait for it, or choose another folder with --out."
                    ) from None
                if not told:
                    view.message(f"Waiting for another command's workers in {out} to end.")
                    told = True
                time.sleep(0.2)
        yield lock
    finally:
        os.close(lock)


def check_folder(out: Path) -> None:
    """Raise UserError unless ``out`` is a study's folder, empty, or not there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder with --out.")
    if out.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        if not (out / STUDY_FILE).exists():
            raise UserError(f"{out} holds something else than a study: choose another folder with --out.")
        read_study_file(out)


class StudyFile(BaseModel):
    """What study.json holds: the study as it was last run, and which of the records beside it belong to it."""

    model_config = ConfigDict(extra="forbid")

    format: str = FORMAT
    study: Study
    command: list[str] = []
    """That was run last."""
    jobs: dict[str, dict[str, list[str]]] = {}
    """By run and stage, the keys of its trainings: those of another learning rate or seed that was once asked for are
    left out."""

    def keys(self, run: str, stage: str) -> list[str]:
        return self.jobs.get(run, {}).get(stage, [])

    def note(self, plan: Plan) -> None:
        """Take the plan's jobs in place of those of the same runs and stages."""
        fresh: dict[str, dict[str, list[str]]] = {}
        for job in plan.jobs:
            fresh.setdefault(job.run, {}).setdefault(job.stage, []).append(job.key)
        for waiting in plan.waiting:
            fresh.setdefault(waiting.run, {})["final"] = []
        for run, stages in fresh.items():
            self.jobs[run] = self.jobs.get(run, {}) | stages

    def write(self, out: Path) -> None:
        write_text(out / STUDY_FILE, self.model_dump_json(indent=1) + "\n")


def read_study_file(out: Path) -> StudyFile:
    """The study whose runs a folder holds. Raises UserError when it holds none."""
    path = out / STUDY_FILE
    if not path.is_file():
        raise UserError(f"{out} holds no study (no {STUDY_FILE}): give the folder that `samba-lm study` wrote.")
    told = read_json(path)
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise UserError(f"{path} was not written by `samba-lm study`: choose another folder.")
    try:
        return StudyFile.model_validate(told)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, StudyFile)}") from None
