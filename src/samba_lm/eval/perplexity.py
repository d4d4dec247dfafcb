"""Perplexity against context length, in memory that does not grow with the length."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError
from samba_lm.eval.intervals import Mean, mean_interval, student
from samba_lm.eval.losses import Meter, OnProgress, score
from samba_lm.eval.protocols import Documents, Job, Protocol, Settings, choose_windows
from samba_lm.eval.text import Text
from samba_lm.memory import free_memory
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from samba_lm.eval.text import Tokens

COPIES = 2.5
"""How often full attention holds its keys and values, about, while a piece is read: before and after it, and what the
layer at work makes of its own."""


@dataclass(frozen=True)
class LengthResult:
    """What was measured at one context length.

    Attributes:
        length: the context length L in tokens.
        positions: the tokens of a window that count, from and up to (not including), as places in it. The token at
            place i was predicted from the tokens before it (for "sliding-window", from at most the window's).
        windows: how many windows were read (for "prefix" and "stream", documents; for "sliding-window", texts of L
            tokens). 0: nothing was measured, see ``note``.
        tokens: predictions that count, over all windows.
        loss: their mean in nats a token; NaN when skipped, or when the model's own numbers were not finite.
        standard_error: of ``loss``, from the spread of the windows' means; NaN for fewer than two. It takes windows for
            independent, so it is too small where they overlap.
        perplexity: exp(loss).
        bits_per_byte: loss x tokens / (ln 2 x bytes of the scored text); None where no tokenizer tells the bytes.
        note: why there is no figure; "" where there is one.
        means: the mean loss of each window, in the order of the text.
        starts: where in the text each of them starts.
        seconds: how long it took, with the other lengths that were read together with this one.
    """

    length: int
    positions: tuple[int, int]
    windows: int
    tokens: int
    loss: float
    standard_error: float
    perplexity: float
    bits_per_byte: float | None
    note: str = ""
    means: tuple[float, ...] = ()
    starts: tuple[int, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def loss_interval(self) -> tuple[float, float]:
        """The 95% interval of the loss, by Student's t; NaN for fewer than two windows."""
        reach = student(self.windows - 1) * self.standard_error if self.windows > 1 else math.nan
        return self.loss - reach, self.loss + reach

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the perplexity."""
        low, high = self.loss_interval
        return _exp(low), _exp(high)

    @property
    def bits_interval(self) -> tuple[float, float]:
        """The 95% interval of the bits a byte."""
        share = math.nan if self.bits_per_byte is None or not self.loss else self.bits_per_byte / self.loss
        low, high = self.loss_interval
        return low * share, high * share


def perplexity(
    model: SambaLM,
    tokens: Tokens,
    lengths: Sequence[int],
    *,
    protocol: Protocol = "full-window",
    stride: int | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    documents: Documents = "same",
    tokenizer: Tokenizer | None = None,
    batch: int | None = None,
    chunk: int | None = None,
    progress: OnProgress | None = None,
) -> list[LengthResult]:
    """Measure a model's perplexity at several context lengths.

    Args:
        model: read in its own dtype, on its own device; losses are summed in fp64.
        tokens: token ids [tokens] of any integer type (a memory map too), a list of these, one a document, or prepared
            data. All protocols but "prefix" and "stream" read the documents as one stream, over their boundaries.
        lengths: context lengths in tokens, each at least 2.
        protocol: what counts; see :data:`samba_lm.eval.protocols.MEANING`.
        stride, window: in tokens; see there.
        max_tokens: bounds (windows) x (length), at each length: the time it takes. One window is always read. The first
            ones are taken, so that lengths compare the same text; "last-stride" spreads them over the text instead,
            and with ``documents`` "every" the longest documents are taken.
        documents: which ones "prefix" and "stream" measure a length on; see
            :data:`samba_lm.eval.protocols.Documents`.
        tokenizer: tells the bytes of the text; prepared data bring their own.
        batch: windows read at once; None: as many as make 2,048 tokens (32,768 on a GPU).
        chunk: tokens of each window read at once; None: 2,048, or more where a GPU has room. Neither changes what is
            measured.
        progress: called with the tokens read so far, and in all, over all lengths.

    Returns:
        One result for each length, rising. Where the text is too short for a length, full attention cannot hold it (its
        ``max_context``, or memory), or the loss is not finite, the result says so in its ``note``.

    Raises:
        UserError: settings that contradict each other, no length has enough text, or ids outside the vocabulary.
    """
    settings = Settings.of(protocol, lengths, stride=stride, window=window, max_tokens=max_tokens, documents=documents)
    results = measure(model, tokens, settings, tokenizer=tokenizer, batch=batch, chunk=chunk, progress=progress)
    return sorted(results, key=lambda result: result.length)


def measure(
    model: SambaLM,
    tokens: Tokens,
    settings: Settings,
    *,
    without: Collection[int] = (),
    tokenizer: Tokenizer | None = None,
    batch: int | None = None,
    chunk: int | None = None,
    progress: OnProgress | None = None,
) -> Iterator[LengthResult]:
    """:func:`perplexity`, each result as it is finished, but for the lengths of ``without``; the others' results do not
    depend on these."""
    for name, value in (("batch", batch), ("chunk", chunk)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1.")
    text = Text.of(tokens)
    if isinstance(tokens, TokenDataset):
        tokens.check_vocab(model.config.vocab_size)
        tokenizer = tokenizer or tokens.tokenizer
    chosen = choose_windows(settings, text, without)
    for length, reason in chosen.skipped.items():
        if length not in without:
            yield _skipped(length, (1, length), reason)
    meter = Meter(sum(job.tokens_to_read for job in chosen.jobs), progress)
    for job in chosen.jobs:
        began, before = time.perf_counter(), meter.done
        buckets, reason = _fitting(model, job)
        sums = []
        for reading in job.readings if buckets else ():
            sums.append(score(model, text, reading, meter, buckets=buckets, batch=batch, chunk=chunk))
            if sums[-1].buckets < buckets:
                buckets = sums[-1].buckets
                reason = f"out of memory with {job.lengths[buckets]:,} tokens"
        losses = np.asarray(sum(each.values[:, :buckets] for each in sums)) if buckets else np.zeros((0, 0))
        meter.add(before + job.tokens_to_read - meter.done)  # what was skipped
        seconds = time.perf_counter() - began
        for i, length in enumerate(job.lengths):
            if length in without:
                continue
            if i < buckets:
                yield _summarise(job, i, losses, text, tokenizer, seconds)
            else:
                yield _skipped(length, job.positions[i], reason)


def difference(one: LengthResult, other: LengthResult) -> Mean:
    """By how much the loss of ``one`` is above that of ``other``, nats a token, window by window.

    The interval is that of the differences, which is much smaller than either loss's own: most of that is the text's.
    Both must be of the same windows; a mean of NaN where that cannot be, or nothing is known of the windows.
    """
    alike = (one.length, one.positions, one.windows) == (other.length, other.positions, other.windows)
    if not alike or not one.windows or len(one.means) != len(other.means):
        return mean_interval([])
    return mean_interval([a - b for a, b in zip(one.means, other.means, strict=True)])


def attention_memory(model: SambaLM, held: int) -> float:
    """About how many bytes full attention takes at most while it reads a text of ``held`` tokens."""
    room = min(1 << (held - 1).bit_length(), model.config.max_context)  # it grows by doubling
    return COPIES * model.config.state_bytes(room, model.dtype.itemsize)


def _fitting(model: SambaLM, job: Job) -> tuple[int, str]:
    """How many of a job's lengths the model can hold, and what keeps it from holding more."""
    config = model.config
    if config.constant_state:
        return len(job.lengths), ""
    free = free_memory() if model.device.type == "cpu" else None  # a GPU says itself when there is no more
    for i, length in enumerate(job.lengths):
        held = max(reading.edges[i + 1] for reading in job.readings) - 1
        if held > config.max_context:
            return i, f"full attention would have to hold {held:,} positions, and max_context is {config.max_context:,}"
        needed = attention_memory(model, held)
        if free is not None and needed > free:
            return i, (
                f"full attention would take about {needed / 2**30:.1f} GiB at length {length:,}, and "
                f"{free / 2**30:.1f} GiB are free"
            )
    return len(job.lengths), ""


def _skipped(length: int, positions: tuple[int, int], reason: str) -> LengthResult:
    return LengthResult(length, positions, 0, 0, math.nan, math.nan, math.nan, None, reason)


def _summarise(
    job: Job, i: int, sums: NDArray[np.float64], text: Text, tokenizer: Tokenizer | None, seconds: float
) -> LengthResult:
    """The result of a job's length number ``i``; its losses sum to ``sums`` [samples, lengths]."""
    first = 0 if job.cumulative else i
    count = sum(reading.starts.shape[1] * (reading.edges[i + 1] - reading.edges[first]) for reading in job.readings)
    reading = job.readings[0]
    samples = slice(None) if reading.reach is None else reading.reach > i
    means = sums[samples, first : i + 1].sum(axis=1) / count
    loss = float(means.mean())
    tokens = count * means.size
    size = 0 if tokenizer is None else _bytes(job, first, i, samples, text, tokenizer)
    return LengthResult(
        length=job.lengths[i],
        positions=job.positions[i],
        windows=means.size,
        tokens=tokens,
        loss=loss if math.isfinite(loss) else math.nan,
        standard_error=_standard_error(means),
        perplexity=_exp(loss),
        bits_per_byte=loss * tokens / (math.log(2) * size) if size else None,
        note="" if math.isfinite(loss) else _not_finite(job.lengths[i], means),
        means=tuple(means.tolist()),
        starts=tuple(reading.starts[samples, 0].tolist()),
        seconds=seconds,
    )


def _bytes(job: Job, first: int, i: int, samples: slice | NDArray[np.bool_], text: Text, tokenizer: Tokenizer) -> int:
    """Bytes of all targets in the buckets ``first`` to ``i``."""
    return sum(
        text.num_bytes(int(start) + low, int(start) + high, tokenizer)
        for reading in job.readings
        for start in reading.starts[samples].flat
        for low, high in pairwise(reading.edges[first : i + 2])
    )


def _standard_error(means: NDArray[np.float64]) -> float:
    if means.size < 2 or not np.isfinite(means).all():
        return math.nan
    return float(means.std(ddof=1)) / math.sqrt(means.size)


def _exp(loss: float) -> float:
    if not math.isfinite(loss):
        return math.nan
    return math.exp(loss) if loss < 700 else math.inf


def _not_finite(length: int, means: NDArray[np.float64]) -> str:
    bad = int(np.count_nonzero(~np.isfinite(means)))
    return (
        f"at length {length:,} the loss is not finite in {bad:,} of {means.size:,} window(s): the weights are damaged, "
        "or the dtype is too narrow (try float32)"
    )
