"""Batches made in the background, so that the device need not wait for them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from samba_lm.data.loader import Batch, Batches


class Ahead:
    """Reads ``batches`` in the order of the steps, always one step ahead of what was asked for.

    While the device computes a step, a thread makes the next one's batch. A context manager: the thread ends with it.

    Args:
        batches: batch n is the same whenever it is made, so reading ahead changes nothing.
        steps: how many there are; none after them is made.
    """

    def __init__(self, batches: Batches, rank: int, world: int, steps: int) -> None:
        self._batches, self._rank, self._world, self._steps = batches, rank, world, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, from 0. Raises what making it raised."""
        known = self._next if self._next is not None and self._next[0] == step else (step, self._make(step))
        batch = known[1].result()
        self._next = (step + 1, self._make(step + 1)) if step + 1 < self._steps else None
        return batch

    def _make(self, step: int) -> Future[Batch]:
        return self._thread.submit(self._batches.batch, step, self._rank, self._world)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Where all ends by an error, such as a second Ctrl-C, a batch may still be waiting for a shard from far away.
        self._thread.shutdown(wait=error is None, cancel_futures=True)
