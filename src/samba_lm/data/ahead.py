"""Batches made in the background, so that the device need not wait for them."""

from __future__ import annotations

from multiprocessing.pool import AsyncResult, ThreadPool
from types import TracebackType

from samba_lm.data.loader import Batch, Batches


class Ahead:
    """Reads ``batches`` in the order of the steps, always one step ahead of what was asked for.

    While the device computes a step, a thread makes the next one's batch. A context manager: the thread ends with it;
    where the context ends by an error, such as a second Ctrl-C, that is not waited for: a batch may be waiting for a
    shard from far away.

    Args:
        batches: batch n is the same whenever it is made, so reading ahead changes nothing.
        steps: how many there are; none after them is made.
    """

    def __init__(self, batches: Batches, rank: int, world: int, steps: int) -> None:
        self._batches, self._rank, self._world, self._steps = batches, rank, world, steps
        # Not concurrent.futures, whose threads hold up the end of the process until they are done.
        self._thread = ThreadPool(1)
        self._next: tuple[int, AsyncResult[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, from 0. Raises what making it raised."""
        known = self._next if self._next is not None and self._next[0] == step else (step, self._make(step))
        batch = known[1].get()
        self._next = (step + 1, self._make(step + 1)) if step + 1 < self._steps else None
        return batch

    def _make(self, step: int) -> AsyncResult[Batch]:
        return self._thread.apply_async(self._batches.batch, (step, self._rank, self._world))

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._thread.terminate()
            return
        self._thread.close()
        self._thread.join()
