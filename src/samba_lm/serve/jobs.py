"""From the engine's thread to asyncio: the sequences of one HTTP request, and their events as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from samba_lm.engine.engine import Engine, QueueFullError
from samba_lm.engine.request import End, Event, Ready, Request
from samba_lm.serve.errors import unavailable
from samba_lm.serve.metrics import Metrics

RETRY_SECONDS = 0.05


class Bridge:
    """Carries all events of an engine to one event loop, waking it once for all that came since it last looked."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: deque[tuple[Job, int, Event]] = deque()
        self._woken = False
        self._jobs: set[Job] = set()

    def submit(self, job: Job, index: int, request: Request) -> Callable[[], None]:
        loop = self._loop = self._loop or asyncio.get_running_loop()
        times = [time.perf_counter(), 0.0]

        def sink(event: Event) -> None:  # on the engine's thread
            self.metrics.note(event, times)
            self._arrived.append((job, index, event))
            if not self._woken and not loop.is_closed():
                self._woken = True
                loop.call_soon_threadsafe(self._deliver)

        cancel = self.engine.submit(request, sink)
        self._jobs.add(job)
        return cancel

    def forget(self, job: Job) -> None:
        """It is over."""
        self._jobs.discard(job)

    def stop_all(self) -> None:
        """End all jobs: the server is shutting down."""
        for job in self._jobs:
            job.stop()

    def _deliver(self) -> None:
        self._woken = False
        while self._arrived:
            job, index, event = self._arrived.popleft()
            job.take(index, event)


class Job:
    """The sequences of one HTTP request: some prompts, each continued ``copies`` times.

    A prompt is read once; its copies begin where it ended. Of many prompts, as many run at once as the engine takes:
    the first must find a place (QueueFullError), the others wait for it. Leaving the iterator cancels all.
    """

    def __init__(self, bridge: Bridge, requests: list[Request], copies: int = 1) -> None:
        self._bridge = bridge
        self._pending: deque[tuple[int, Request]] = deque()
        self._later: dict[int, list[tuple[int, Request]]] = {}
        for i, request in enumerate(requests):
            first = i * copies
            self._pending.append((first, replace(request, keep_prompt=True) if copies > 1 else request))
            again = replace(request, tokens=(), keep=False, prompt_logprobs=False)
            seeds = [request.params.replace(seed=(request.params.seed + j) % 2**64) for j in range(copies)]
            self._later[first] = [(first + j, replace(again, params=seeds[j])) for j in range(1, copies)]
        self._live: dict[int, Callable[[], None]] = {}
        self._left = len(requests) * copies
        self._events: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()
        self._stopped = False
        self._submit()

    def take(self, index: int, event: Event) -> None:
        """An event of one sequence, on the loop's thread."""
        if isinstance(event, Ready) and self._later.get(index):
            self._pending.extendleft(
                reversed([(i, replace(one, context=event.reader)) for i, one in self._later.pop(index)])
            )
        self._events.append((index, event))
        self._wake.set()

    async def events(self, patience: float | None = None) -> AsyncIterator[list[tuple[int, Event]]]:
        """What has come since the last time, with the sequence's number; an empty list after ``patience`` seconds of
        nothing. Ends when all sequences have. Raises the first error of any."""
        try:
            quiet_since = time.monotonic()
            while self._left:
                if self._stopped:
                    raise unavailable()
                if not self._events:
                    await self._wait(patience)
                if not self._events and not self._stopped:
                    if patience is not None and time.monotonic() - quiet_since >= patience:
                        quiet_since = time.monotonic()
                        yield []
                    self._submit(wait=True)
                    continue
                self._wake.clear()
                batch = list(self._events)
                self._events.clear()
                for index, event in batch:
                    if isinstance(event, End):
                        if event.error is not None:
                            raise event.error
                        self._live.pop(index)
                        self._left -= 1
                self._submit(wait=True)
                quiet_since = time.monotonic()
                yield batch
        finally:
            self.close()

    def close(self) -> None:
        """Cancel what still runs."""
        for cancel in self._live.values():
            cancel()
        self._live.clear()
        self._pending.clear()
        self._bridge.forget(self)

    def stop(self) -> None:
        """Let :meth:`events` raise that the server is shutting down."""
        self._stopped = True
        self._wake.set()

    async def _wait(self, patience: float | None) -> None:
        # Others may have taken all places between two of our sequences: then nothing of ours will wake us.
        seconds = RETRY_SECONDS if self._pending and not self._live else patience
        # Not wait_for: Python 3.11's loses a cancellation that comes together with the event, and a stream whose
        # client has left would go on for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _submit(self, wait: bool = False) -> None:
        while self._pending:
            index, request = self._pending[0]
            try:
                self._live[index] = self._bridge.submit(self, index, request)
            except QueueFullError:
                if not wait and not self._live:
                    raise
                return
            self._pending.popleft()
