"""Continuous batching: prompts are read a piece at a time between the steps in which every running text grows."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TypeGuard

import torch

from samba_lm.engine.batch import Batch, Step
from samba_lm.engine.prefiller import Prefiller
from samba_lm.engine.request import Completion, End, Event, Finish, Piece, Request, Sink
from samba_lm.engine.sequence import Sequence as Running
from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.generation.prompt import Prompt, prompt_chunks
from samba_lm.generation.stream import check_request
from samba_lm.model import SambaLM
from samba_lm.state import State
from samba_lm.tokenizer import Tokenizer

PROMPT_FAILS = (UserError, OSError, ValueError, torch.OutOfMemoryError)
"""What may go wrong with one prompt, which then ends itself and not the engine."""


class StoppedError(UserError):
    """The engine takes no more requests: it was closed, or has failed."""


class QueueFullError(UserError):
    """More requests wait than the engine was told to hold."""


class Engine:
    """Many texts at once from one model, each as if it were alone.

    A thread of its own does all the work; requests come from any thread. In every step each running text gets one
    token, and at most ``chunk`` tokens of prompts are read, so that a long prompt never holds up the others. What a
    sequence costs does not depend on how long it is (but with full attention).

    Args:
        model: is the engine's while it runs: in evaluation mode, with parameters that nobody changes any more.
        slots: texts continued at once; more wait their turn.
        queue_limit: requests that may wait; None: any number.
        chunk: prompt tokens read between two steps.
        batch_invariant: make a greedy answer the same to the last bit whatever else runs, however its prompt was cut
            and from whichever copy of a context it began: prompts are then read one token a step, and every step
            computes all slots, so that all matrix products have one shape. Reading costs as much as writing.
        ahead: start a step before the tokens of the one before have been looked at, where no text needs that, so that a
            GPU never waits for Python; answers are the same. None: on a GPU.

    Attributes:
        constant: a sequence's state has one size however long it is; without, no text may be without end.

    Use it as a context manager, or call :meth:`close`. Raises UserError for sizes below 1 and a tokenizer that does
    not fit the model.
    """

    def __init__(
        self,
        model: SambaLM,
        tokenizer: Tokenizer,
        *,
        slots: int = 16,
        queue_limit: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        batch_invariant: bool = False,
        ahead: bool | None = None,
    ) -> None:
        check_request(model, tokenizer, chunk)
        self.model, self.tokenizer = model.eval(), tokenizer
        model.fix_parameters()
        on_gpu = model.device.type == "cuda"
        ahead = on_gpu if ahead is None else ahead
        self._batch = Batch(model, tokenizer.vocab_size, slots, whole=batch_invariant, ahead=ahead)
        self.slots = self._batch.slots
        self.chunk, self.queue_limit, self.batch_invariant = chunk, queue_limit, batch_invariant
        far = 1 << 30
        self.constant = model.config.state_bytes(far) == model.config.state_bytes(2 * far)
        self._waiting: deque[Running] = deque()
        self._reading: deque[Running] = deque()
        self._taken = 0  # of the slots: by those being read and those running
        self._prefiller = Prefiller(model, chunk, graphs=on_gpu and self.constant)
        self._wake = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="samba-lm engine", daemon=True)
        self._thread.start()

    # For everyone, from any thread.

    def submit(self, request: Request, sink: Sink) -> Callable[[], None]:
        """Queue a request, whose events go to ``sink``; returns what cancels it.

        Raises QueueFullError when too many wait already, StoppedError when it takes no more, UserError for a request
        that no answer could be given to.
        """
        if request.params.max_tokens is None and not self.constant:
            raise UserError(
                f"{self.model.config.name} has full attention, whose memory grows with the text: unlimited generation "
                "needs a model of constant state; give max_tokens."
            )
        running = Running(request, self.tokenizer, sink)
        with self._wake:
            if self._failure is not None or self._closing:
                raise StoppedError(f"The engine has stopped: {self._failure or 'it was closed'}.")
            self.check_room()
            self._waiting.append(running)
            self._wake.notify()

        def cancel() -> None:
            running.cancelled = True
            with self._wake:
                self._wake.notify()

        return cancel

    def check_room(self) -> None:
        """Raise QueueFullError when no request could be taken now."""
        with self._wake:
            waiting, free = len(self._waiting), self.slots.capacity - self._taken
        if self.queue_limit is not None and waiting >= self.queue_limit + free:
            raise QueueFullError(f"{waiting} requests are waiting, the limit is {self.queue_limit}: try again later.")

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of a request as they come, the last an End; leaving early cancels it. Raises its error."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        cancel = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                last = _is_last(event)
                yield event
                if last:
                    return
        finally:
            cancel()

    async def astream(self, request: Request) -> AsyncIterator[Event]:
        """As :meth:`stream`, for ``async for``."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def sink(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        cancel = self.submit(request, sink)
        try:
            while True:
                event = await events.get()
                last = _is_last(event)
                yield event
                if last:
                    return
        finally:
            cancel()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue all prompts, as many at once as there are slots; the answers in the order of the prompts.

        ``params``: of all of them, or one for each. Raises UserError for any prompt or option that is wrong.
        """
        if isinstance(prompts, str):
            raise UserError("generate() takes a list of prompts: put the text into one.")
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"There are {len(prompts)} prompts but {len(each)} params: give one for each, or one.")
        requests = [Request(prompt_chunks(p, self.tokenizer), one) for p, one in zip(prompts, each, strict=True)]
        return self.complete(requests)

    def complete(
        self, requests: Sequence[Request], note: Callable[[int, Event], None] | None = None
    ) -> list[Completion]:
        """The answers to all requests, as many at once as there are slots, in the order of the requests.

        ``note``: told each request's number and event as it comes. Raises the first error that ends one, and cancels
        the others.
        """
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        cancels, texts, tokens = [], [""] * len(requests), [[] for _ in requests]  # type: ignore[var-annotated]
        ends: dict[int, End] = {}
        began = 0
        try:
            while len(ends) < len(requests):
                # Not all at once, so that the engine's queue stays open for others.
                while began < len(requests) and began - len(ends) < 2 * self.slots.capacity:
                    cancels.append(self.submit(requests[began], lambda event, i=began: events.put((i, event))))  # type: ignore[misc]
                    began += 1
                i, event = events.get()
                if note is not None:
                    note(i, event)
                if isinstance(event, Piece):
                    texts[i] += event.text
                    tokens[i] += event.tokens
                elif _is_last(event):
                    ends[i] = event
        finally:
            for cancel in cancels:
                cancel()
        return [Completion(texts[i], tuple(tokens[i]), ends[i]) for i in range(len(requests))]

    def counts(self) -> dict[str, int]:
        """How many requests are waiting, being read and running."""
        return {"waiting": len(self._waiting), "reading": len(self._reading), "running": len(self._batch.running)}

    @property
    def failure(self) -> BaseException | None:
        """What stopped the engine, if anything did."""
        return self._failure

    def close(self) -> None:
        """End all requests as cancelled, and the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self.model.fix_parameters(False)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # On the engine's thread.

    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._closing or self._waiting or self._reading or self._batch.running):
                        self._wake.wait()
                    if self._closing:
                        break
                with torch.inference_mode():
                    self._turn()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            with self._wake:
                self._closing = True
                left = [*self._waiting, *self._reading, *self._batch.running]
                self._waiting.clear()
            for running in left:
                running.end("cancelled" if self._failure is None else "error", self._failure)

    def _turn(self) -> None:
        self._cancel()
        self._admit()
        if self._reading:
            self._read()
        if self._batch.running:
            self._decode()

    def _cancel(self) -> None:
        with self._wake:
            for waiting in [w for w in self._waiting if w.cancelled]:
                self._waiting.remove(waiting)
                waiting.end("cancelled")
        for reading in [r for r in self._reading if r.cancelled]:
            self._reading.remove(reading)
            self._end_unread(reading, "cancelled")
        for row in reversed(range(len(self._batch.running))):
            if self._batch.running[row].cancelled:
                self._finish(row, "cancelled")

    def _admit(self) -> None:
        while self._waiting and self._taken < self.slots.capacity:
            with self._wake:
                running = self._waiting.popleft()
                self._taken += 1
            try:
                running.begin(self.model, self.batch_invariant)
                self._require_room(running.length + len(running.unread))
            except PROMPT_FAILS as error:
                self._end(running, "error", error)
                continue
            if self.batch_invariant:
                self._start(running)
            else:
                self._reading.append(running)

    def _require_room(self, length: int) -> None:
        most = self.model.config.max_context
        if not self.constant and length > most:
            raise UserError(
                f"The prompt has {length} tokens, but {self.model.config.name} has full attention and a max_context of "
                f"{most}: give a shorter one, raise max_context in config.json, or use a model with a window."
            )

    def _read(self) -> None:
        """At most ``chunk`` tokens of the prompts that came first."""
        left = self.chunk
        while self._reading and left > 0:
            running = self._reading[0]
            try:
                left -= running.read(self.model, self._prefiller, left)
            except PROMPT_FAILS as error:
                self._reading.popleft()
                self._end(running, "error", error)
                continue
            if running.has_read:
                self._reading.popleft()
                if running.answer.finish is not None:  # nothing was to be made
                    assert running.reader is not None
                    if running.request.keep_prompt:
                        running.tell_ready(running.reader.fork())
                    self._end_unread(running, running.answer.finish)
                else:
                    self._start(running)

    def _end_unread(self, running: Running, finish: Finish) -> None:
        """End what never had a row: its state is the prefiller's memory, which others will read into."""
        if running.request.keep and running.reader is not None:
            running.reader = running.reader.fork()
        self._end(running, finish)

    def _start(self, running: Running) -> None:
        """Give a sequence a row; what was read tells its first token."""
        reader = running.reader
        assert reader is not None
        if running.request.keep_prompt and not running.unread:
            running.tell_ready(reader.fork())
        first = None if running.unread else self._batch.first(running)
        self._batch.add(running, reader.state, reader.history)
        reader.state, reader.history = State(reader.state.cursor, []), None  # they live in the row now
        if first is not None:
            self._take(first)

    def _decode(self) -> None:
        """One token for every running sequence: read the one it made last, and draw the next."""
        step = self._batch.step()
        for one in step.running:
            if not one.over:
                one.advance()
        for row in step.reading:
            one = step.running[row]
            if one.unread and one.request.prompt_logprobs:
                try:
                    one.note_prompt(step.logits[row : row + 1])
                except UserError as error:
                    one.error = error
            elif not one.unread:
                self._has_read(one, row, step.logits[row : row + 1])
        self._take(step)

    def _has_read(self, running: Running, row: int, logits: torch.Tensor) -> None:
        """Note what the last token of a prompt told that was read one token a step."""
        reader = running.reader
        assert reader is not None
        reader.logits = logits.clone()
        if running.request.keep_prompt:
            state, history = self._batch.standing(row)
            running.tell_ready(Reader(state, list(reader.lengths), reader.logits, history))

    def _take(self, step: Step) -> None:
        """Tell each sequence its next token; those that have ended leave their rows."""
        for one, token_id, token in step.results():
            if not (one.over or one.unread or one.answer.finish is not None or one.error is not None):
                try:
                    one.feed(token_id, token)
                except UserError as error:
                    one.error = error
        running = self._batch.running
        for row in reversed(range(len(running))):
            one = running[row]
            if one.error is not None:
                self._finish(row, "error", one.error)
            elif one.answer.finish is not None and not one.unread:
                self._finish(row, one.answer.finish)
            elif not self.constant and one.length >= self.model.config.max_context:
                self._finish(row, "length")  # no room to read what was made last

    def _finish(self, row: int, finish: Finish, error: BaseException | None = None) -> None:
        running = self._batch.running[row]
        if running.request.keep and error is None:
            running.settle(*self._batch.standing(row))
        self._batch.remove(row)
        self._end(running, finish, error)

    def _end(self, running: Running, finish: Finish, error: BaseException | None = None) -> None:
        """Of a sequence that has a slot no more, let others have it."""
        with self._wake:
            self._taken -= 1
        running.end(finish, error)


def _is_last(event: Event) -> TypeGuard[End]:
    """Whether a text ends with this event. Raises the error that ended it."""
    if isinstance(event, End) and event.error is not None:
        raise event.error
    return isinstance(event, End)
