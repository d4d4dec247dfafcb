"""Sums of a model's losses over windows of a text, read in pieces, in whatever memory there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samba_lm.eval.protocols import Reading
from samba_lm.eval.text import Text
from samba_lm.memory import ran_out
from samba_lm.model import SambaLM, evaluating
from samba_lm.span import Span
from samba_lm.state import State

if TYPE_CHECKING:
    from numpy.typing import NDArray

OnProgress = Callable[[int, int], None]
"""Called with the tokens read so far, and in all."""

CHUNK = 2048
"""Tokens of a window read at once, at most; more where a GPU has room for more tokens than the windows are many."""

TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 15}
"""Tokens read at once over all windows of a batch, where no batch size is given."""

LOGITS_AT_ONCE = 1 << 24
"""Logits held at once (elements; 64 MiB in fp32)."""


class Meter:
    """Counts the tokens read and tells the caller."""

    def __init__(self, total: int, progress: OnProgress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, tokens: int) -> None:
        self.done += tokens
        if tokens and self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class Sums:
    """The losses of a reading's samples.

    Attributes:
        values: fp64 [samples, buckets], in nats; 0 in buckets that a sample does not have.
        buckets: how many were read to their end in every sample that has them: fewer than all where memory ended.
    """

    values: NDArray[np.float64]
    buckets: int


@torch.no_grad()
def score(
    model: SambaLM,
    text: Text,
    reading: Reading,
    meter: Meter,
    *,
    buckets: int,
    batch: int | None = None,
    chunk: int | None = None,
) -> Sums:
    """Read the windows as far as the first ``buckets`` buckets.

    Args:
        batch: windows read at once; None: as many as make ``TOKENS_AT_ONCE``.
        chunk: tokens of each window read at once; None: as many as batch and device allow. Where memory is too small
            for them, both are made smaller, down to one window and ``CHUNK``. Neither changes what is measured.
    """
    starts, windows = reading.starts.reshape(-1), reading.starts.shape[1]
    if reading.reach is None:
        reach = np.full(starts.size, buckets)
    else:
        reach = np.minimum(np.repeat(reading.reach, windows), buckets)
    values = np.zeros((starts.size, buckets))
    # Windows that are read equally far go together.
    waiting = [
        part
        for far in np.unique(reach)
        for part in _batches(model, np.flatnonzero(reach == far), reading, batch, chunk)
    ]
    with evaluating(model):
        while waiting:
            part = waiting.pop()
            edges = reading.edges[: min(reach[part.rows[0]], buckets) + 1]
            if len(edges) == 1:
                continue
            before = meter.done
            sums, read = _read(model, text, starts[part.rows], edges, part.chunk, meter)
            if read == len(edges) - 1:
                values[part.rows, :read] = sums
            elif smaller := part.smaller():
                waiting += smaller
                meter.add(before - meter.done)
            else:
                buckets = read  # of all windows then, which are to be of the same lengths
                values[part.rows, :read] = sums[:, :read]
    return Sums(values[:, :buckets].reshape(*reading.starts.shape, -1).sum(axis=1), buckets)


@dataclass(frozen=True)
class _Batch:
    """Windows that are read together, ``chunk`` tokens of each at once."""

    rows: NDArray[np.intp]
    chunk: int

    def smaller(self) -> list[_Batch]:
        """The same work in less memory, if that is possible."""
        if self.rows.size > 1:
            return [_Batch(half, self.chunk) for half in np.array_split(self.rows, 2)]
        return [_Batch(self.rows, CHUNK)] if self.chunk > CHUNK else []


def _batches(
    model: SambaLM, rows: NDArray[np.intp], reading: Reading, batch: int | None, chunk: int | None
) -> list[_Batch]:
    tokens = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cpu"])
    # Full attention holds every window's whole past, so its windows count in full.
    held = min(reading.length, chunk or CHUNK) if model.config.constant_state else reading.length
    at_once = min(rows.size, batch or max(1, tokens // held))
    parts = np.array_split(rows, -(-rows.size // at_once)) if batch is None else _slices(rows, batch)
    # Of a multiple of 256, which kernels like.
    return [_Batch(part, chunk or max(CHUNK, tokens // part.size // 256 * 256)) for part in parts]


def _slices(rows: NDArray[np.intp], size: int) -> list[NDArray[np.intp]]:
    return [rows[first : first + size] for first in range(0, rows.size, size)]


def _read(
    model: SambaLM, text: Text, starts: NDArray[np.int64], edges: tuple[int, ...], chunk: int, meter: Meter
) -> tuple[NDArray[np.float64], int]:
    """Read one window from each start: sums of its losses in each bucket, fp64 [rows, buckets], and how many of the
    buckets were read to their end before there was no memory left."""
    sums = torch.zeros(starts.size, len(edges) - 1, dtype=torch.float64, device=model.device)
    state: State | None = None
    last = edges[-1] - 1  # a target only: nothing is predicted from it
    read = 0
    try:
        for begin in range(0, last, chunk):
            end = min(begin + chunk, last)
            rows = torch.from_numpy(text.rows(starts + begin, end - begin + 1, model.config.vocab_size))
            ids = rows.to(model.device, non_blocking=True)
            hidden, state = _features(model, ids[:, :-1], state, begin)
            for bucket, (low, high) in enumerate(pairwise(edges)):
                # This chunk's targets are the tokens begin + 1 .. end of the window.
                a, b = max(low - 1, begin) - begin, min(high - 1, end) - begin
                if a < b:
                    sums[:, bucket] += _loss_sums(model, hidden[:, a:b], ids[:, a + 1 : b + 1])
            read = end
            meter.add(starts.size * (end - begin + (end == last)))
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    state = None
    if read < last and model.device.type == "cuda":
        torch.cuda.empty_cache()  # what is tried next has other sizes
    return sums.cpu().numpy(), sum(high - 1 <= read for high in edges[1:])


def _features(model: SambaLM, ids: Tensor, state: State | None, begin: int) -> tuple[Tensor, State]:
    """``model.features`` of tokens that all stand ``begin`` tokens from their window's start: said, so that attention
    need not ask a GPU for it and wait for all that it was given to do."""
    cursor = None if state is None else state.cursor
    span = Span.of(ids.shape[0], ids.shape[1], ids.device, cursor, None, longest=begin)
    return model.run(ids, state, span)


def _loss_sums(model: SambaLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sums over each row of the cross-entropy of targets [B, L], fp64 [B]; never all logits at once."""
    piece = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    losses = []
    for h, t in zip(hidden.flatten(0, 1).split(piece), targets.flatten().split(piece), strict=True):
        logits = model.head(h)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses.append(F.cross_entropy(wide, t, reduction="none").double())
    return torch.cat(losses).view(targets.shape).sum(1)
