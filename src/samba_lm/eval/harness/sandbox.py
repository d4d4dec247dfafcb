"""Untrusted programs, each run in a process of its own with as little as it needs.

A program gets a folder of its own, an empty environment, no standard streams, and limits: of processor time, wall-clock
time, memory, open files, bytes it writes (none) and processes (none). On Linux it has no network, makes and changes no
file, and can neither start nor touch other processes: an empty network, Landlock, and a filter of system calls see to
that, where the kernel has them. :func:`leaks` tries which of these hold here. It may still read files that this user
may read, though it has no way to tell anybody.

Success is a random word which the process gives back when the program has run to its end, so that neither an early exit
nor anything printed counts. A program written against this very module could look for the word; one that a model writes
as an answer to a question does not.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from samba_lm.errors import UserError

MEMORY = 1 << 30
ANSWER_BYTES = 4096


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why: "timed out", "ended early", or the exception."""

    passed: bool
    why: str = ""


def run_program(source: str, *, seconds: float = 10.0, memory: int = MEMORY) -> Outcome:
    """Run a program of the standard library's Python, shut in; see the module.

    Args:
        seconds: it may take, of the clock; as much of the processor, rounded up.
        memory: bytes of address space.

    Raises UserError where no process can be started, and on Windows, which knows no such limits.
    """
    if sys.platform == "win32":
        raise UserError("Programs can be shut in on Linux and macOS only: use WSL or a container.")
    child = Path(__file__).with_name("sandboxed.py").read_text(encoding="utf-8")
    word = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="samba-lm-program-")
    try:
        Path(folder, "program.py").write_text(source, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", child]
        try:
            process = subprocess.Popen(
                command, cwd=folder, env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"No process can be started for a program ({error.strerror}): free some.") from error
        with process:
            try:
                told = _converse(process, f"{word} {int(seconds) + 1} {memory}\n", time.monotonic() + seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if told is None:
        return Outcome(False, "timed out")
    first, _, why = told.partition("\n")
    return Outcome(True) if secrets.compare_digest(first, word) else Outcome(False, why or "ended early")


def _converse(process: subprocess.Popen[bytes], word: str, deadline: float) -> str | None:
    """Tell the word, and hear what comes back until the process closes its end; None: not in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(word.encode())
        process.stdin.close()
    told = b""
    with selectors.DefaultSelector() as wait:
        wait.register(process.stdout, selectors.EVENT_READ)
        while len(told) < ANSWER_BYTES:
            if not wait.select(max(0.0, deadline - time.monotonic())):
                return None
            part = os.read(process.stdout.fileno(), ANSWER_BYTES)
            if not part:
                break
            told += part
    return told.decode(errors="replace")


def run_programs(sources: Sequence[str], *, seconds: float = 10.0, at_once: int | None = None) -> list[Outcome]:
    """:func:`run_program` for many, as many at once as there are processors."""
    with ThreadPoolExecutor(at_once or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda source: run_program(source, seconds=seconds), sources))


TRIED = {
    "start processes": "import os\npid = os.fork()\nif not pid: os._exit(0)",
    "open network connections": "import socket\nsocket.socket().close()",
    "change files": "open({outside!r}, 'a').close()",
    "signal other processes": "import os\nos.kill({parent}, 0)",
}


def leaks() -> list[str]:
    """What programs can do here all the same, in words: each is tried."""
    with tempfile.TemporaryDirectory(prefix="samba-lm-outside-") as outside:
        os.chmod(outside, 0o777)
        parts = {"outside": str(Path(outside, "file")), "parent": os.getpid()}
        return [what for what, source in TRIED.items() if run_program(source.format(**parts)).passed]
