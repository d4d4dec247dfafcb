"""A worker as the runner sees it: a process that is given jobs and tells what becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from samba_lm.errors import one_line
from samba_lm.study.plan import Job

STOPPED = 143
"""Exit code of a worker that was asked to stop (128 + SIGTERM); its job goes on from its checkpoint."""
LOG_TAIL = 1 << 14


def job_line(job: Job, out: Path, provenance: Mapping[str, object], shared: int = 1) -> str:
    """A job as a worker reads it; ``shared``: how many workers compute where it does."""
    told = {
        "run": job.run,
        "stage": job.stage,
        "lr": job.lr,
        "seed": job.seed,
        "fingerprint": job.fingerprint,
        "recipe": job.recipe.to_dict(),
        "config": job.config.to_dict(),
        "evaluations": [[evaluation.model_dump(mode="json"), mark] for evaluation, mark in job.evaluations],
        "keep": job.keep,
    }
    around = {"out": str(out), "provenance": dict(provenance), "runner": os.getpid(), "shared": shared}
    return json.dumps({"job": told, **around}) + "\n"


@dataclass(frozen=True)
class Place:
    """Where a worker computes: its name for people, and the environment variables that make it so."""

    name: str
    environment: Mapping[str, str]
    shared: int = 1
    """Workers that compute there."""


@dataclass
class Happening:
    """What a worker told, or (event None) that its process ended."""

    worker: WorkerProcess
    process: subprocess.Popen[str]
    event: dict[str, Any] | None


@dataclass
class WorkerProcess:
    """One of the workers; its process is started when there is a job, and anew after one that failed."""

    place: Place
    log: Path
    happenings: SimpleQueue[Happening]
    inherited: tuple[int, ...] = ()
    """File descriptors that its processes hold open: the study's lock."""
    process: subprocess.Popen[str] | None = None
    job: Job | None = None
    _threads: list[threading.Thread] = field(default_factory=list)

    def give(self, job: Job, out: Path, provenance: Mapping[str, object]) -> None:
        """Have a job done."""
        self.job = job
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: its reader tells
            self.process.stdin.write(job_line(job, out, provenance, self.place.shared))
            self.process.stdin.flush()

    def _start(self) -> subprocess.Popen[str]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "samba_lm.study.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.place.environment},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is the runner's: it asks its workers to stop
                pass_fds=self.inherited,
            )
        thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        thread.start()
        self._threads.append(thread)
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:  # cut short by a kill
                    continue
                self.happenings.put(Happening(self, process, event))
        process.wait()
        self.happenings.put(Happening(self, process, None))

    def retire(self) -> None:
        """Let the process end, if it has not, after what it does now; the next job gets a new one."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def last_words(self, code: int) -> str:
        """Why the process ended, in a line: the last one it wrote, and the signal that killed it."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        said = one_line(lines[-1])[:500] if lines else ""
        if code < 0:
            name = signal.Signals(-code).name
            how = f"its process was ended by {name}" + (" (often: too little memory)" if name == "SIGKILL" else "")
        else:
            how = f"its process ended with exit code {code}"
        return f"{said} ({how})" if said and code >= 0 else how
