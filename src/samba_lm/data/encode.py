"""Encoding in several processes, the results in the order of the input.

Each worker has one errand at a time and one pipe, and the errands go round: no queue, no lock and no thread that an
interrupt could leave waiting. A worker whose parent is gone reads the end of its pipe, and ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeVar

from samba_lm.data.shards import token_dtype
from samba_lm.errors import UserError
from samba_lm.tokenizer import Tokenizer, tokenizer_from_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

Label = TypeVar("Label")

ERRAND_CHARS = 2**18


def encode_in_order(
    texts: Iterable[tuple[str, Label]], tokenizer: Tokenizer, processes: int
) -> Generator[tuple[Label, NDArray], None, None]:
    """Yield the label and the ids of each text, in order; reads at most ``processes`` errands ahead.

    With one process the work is done here; more are spawned as there is work for them. They end with the generator:
    read it to its end or close it.

    Raises:
        UserError: a text cannot be encoded, or a worker was killed.
    """
    errands = _errands(texts)
    if processes == 1:
        for labels, batch in errands:
            yield from zip(labels, tokenizer.encode_batch(batch), strict=True)
        return
    workers: list[_Worker] = []
    busy: deque[tuple[_Worker, list[Label]]] = deque()
    try:
        for labels, batch in errands:
            results: Iterable[tuple[Label, NDArray]] = ()
            if len(workers) < processes:
                workers.append(_Worker(tokenizer))
                worker = workers[-1]
            else:
                worker, done = busy.popleft()
                results = zip(done, worker.result(), strict=True)
            # The next errand first: the worker goes on while the results are used.
            worker.give(batch)
            busy.append((worker, labels))
            yield from results
        for worker, labels in busy:
            yield from zip(labels, worker.result(), strict=True)
    finally:
        for worker in workers:
            worker.end()


def _errands(texts: Iterable[tuple[str, Label]]) -> Iterator[tuple[list[Label], list[str]]]:
    """Group texts until they are worth sending to a worker."""
    labels: list[Label] = []
    batch: list[str] = []
    size = 0
    for text, label in texts:
        labels.append(label)
        batch.append(text)
        size += len(text)
        if size >= ERRAND_CHARS:
            yield labels, batch
            labels, batch, size = [], [], 0
    if batch:
        yield labels, batch


class _Worker:
    """A process that encodes, and our end of its pipe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, tokenizer.to_json(), tokenizer.eos_token)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        # Ctrl-C reaches the whole process group, but the parent alone is to stop, and to end its workers. The child
        # inherits the mask, so that not even its imports are interrupted. (Starting the tracker undoes the mask, and
        # the first start of a process would start it.)
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def give(self, texts: list[str]) -> None:
        try:
            self._pipe.send(texts)
        except OSError as error:
            raise self._death() from error

    def result(self) -> Sequence[NDArray]:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, UserError):
            raise answer
        ids: Sequence[NDArray] = answer
        return ids

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def _death(self) -> UserError:
        self._process.join()
        return UserError(
            f"An encoding process ended (exit code {self._process.exitcode}; out of memory?): "
            "run again with fewer --processes."
        )


def _work(pipe: Connection, content: str, eos: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = tokenizer_from_json(content, eos=eos)
    dtype = token_dtype(tokenizer.vocab_size)  # a quarter of the bytes to send back
    # The pipe ends with the parent: then there is nothing left to do, and nobody to tell.
    with contextlib.suppress(EOFError, OSError):
        while True:
            texts = pipe.recv()
            answer: list[NDArray] | UserError
            try:
                answer = [ids.astype(dtype) for ids in tokenizer.encode_batch(texts)]
            except UserError as error:
                answer = error
            pipe.send(answer)
