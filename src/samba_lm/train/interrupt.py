"""Ctrl-C, SIGTERM and a closed terminal as a request to stop after the step that is running."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether, and by which signal, a stop was asked for."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals(tell: bool = True) -> Iterator[StopRequest]:
    """Catch the first SIGINT, SIGTERM or SIGHUP; the handlers of before then stand again: a second one stops at once.

    SIGHUP stays ignored where it was (nohup). Outside the main thread, where Python allows no handlers, the request
    stays unset. ``tell``: say so on stderr; torchrun passes a signal on to all processes, of which one speaks.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()
        if number == signal.SIGHUP:
            _leave_terminal()
        if tell:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nStopping after this step; once more stops at once.\n")

    try:
        for number in before:
            signal.signal(number, stop)
        yield request
    finally:
        restore()


def _leave_terminal() -> None:
    """Point stdout and stderr to nowhere if they are a terminal: it is gone, and writing to it would be an error."""
    with open(os.devnull, "wb") as nowhere:
        for fd in (1, 2):
            with contextlib.suppress(OSError):  # closed
                if stat.S_ISCHR(os.fstat(fd).st_mode):
                    os.dup2(nowhere.fileno(), fd)
