"""Perplexity against context length, in memory that does not grow with the length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samba_lm.data.shards import TokenDataset
from samba_lm.errors import UserError
from samba_lm.eval.protocols import Job, Protocol, Reading, Settings, choose_windows
from samba_lm.eval.text import Text
from samba_lm.model import SambaLM, evaluating
from samba_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from samba_lm.eval.text import Tokens

OnProgress = Callable[[int, int], None]
"""Called with the tokens read so far, and in all, over all lengths."""

CHUNK = 2048
"""Tokens of a window read at once."""

TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 15}
"""Tokens read at once over all windows of a batch, where no batch size is given."""

LOGITS_AT_ONCE = 1 << 24
"""Logits held at once (elements; 64 MiB in fp32)."""


@dataclass(frozen=True)
class LengthResult:
    """What was measured at one context length.

    Attributes:
        length: the context length L in tokens.
        positions: the tokens of a window that count, from and up to (not including), as places in it. The token at
            place i was predicted from the tokens before it (for "sliding-window", from at most the window's).
        windows: how many windows were read (for "prefix" and "stream", documents; for "sliding-window", texts of L
            tokens). 0: skipped, see ``note``.
        tokens: predictions that count, over all windows.
        loss: their mean in nats a token; NaN when skipped, or when the model's own numbers were not finite.
        standard_error: of ``loss``, from the spread of the windows' means; NaN for fewer than two. It takes windows for
            independent, so it is too small where they overlap.
        perplexity: exp(loss).
        bits_per_byte: loss x tokens / (ln 2 x bytes of the scored text); None where no tokenizer tells the bytes.
        note: why there is no figure; "" where there is one.
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


def perplexity(
    model: SambaLM,
    tokens: Tokens,
    lengths: Sequence[int],
    *,
    protocol: Protocol = "full-window",
    stride: int | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    batch: int | None = None,
    chunk: int = CHUNK,
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
            ones are taken, so that lengths compare the same text; "last-stride" spreads them over the text instead.
        tokenizer: tells the bytes of the text; prepared data bring their own.
        batch: windows read at once; None: as many as make 2,048 tokens (32,768 on a GPU).
        chunk: tokens of each window read at once. Neither changes what is measured.
        progress: see :data:`OnProgress`.

    Returns:
        One result for each length, rising. Where the text is too short for a length, or the loss is not finite, the
        result says so in its ``note``.

    Raises:
        UserError: settings that contradict each other, no length has enough text, ids outside the vocabulary, or full
            attention would have to hold more than the config's ``max_context``.
    """
    for name, value in (("batch", batch), ("chunk", chunk)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1.")
    settings = Settings.of(protocol, lengths, stride=stride, window=window, max_tokens=max_tokens)
    text = Text.of(tokens)
    if isinstance(tokens, TokenDataset):
        tokens.check_vocab(model.config.vocab_size)
        tokenizer = tokenizer or tokens.tokenizer
    chosen = choose_windows(settings, text)
    _check_context(model, chosen.jobs)
    meter = _Meter(sum(job.tokens_to_read for job in chosen.jobs), progress)
    results = []
    for job in chosen.jobs:
        sums = sum(_score(model, text, reading, batch, chunk, meter) for reading in job.readings)
        results += _summarise(job, np.asarray(sums), text, tokenizer)
    for length, reason in chosen.skipped.items():
        results.append(LengthResult(length, (1, length), 0, 0, math.nan, math.nan, math.nan, None, reason))
    return sorted(results, key=lambda result: result.length)


class _Meter:
    """Counts the tokens read and tells the caller."""

    def __init__(self, total: int, progress: OnProgress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, tokens: int) -> None:
        self.done += tokens
        if self.progress is not None:
            self.progress(self.done, self.total)


def _check_context(model: SambaLM, jobs: Sequence[Job]) -> None:
    longest = max(reading.length for job in jobs for reading in job.readings)
    if longest - 1 > model.config.max_context and not model.config.constant_state:
        raise UserError(
            f"Full attention would have to hold {longest - 1} positions, but max_context is "
            f"{model.config.max_context}: leave out the longest lengths, raise max_context in the model's config.json, "
            "or measure with sliding-window."
        )


@torch.no_grad()
def _score(
    model: SambaLM, text: Text, reading: Reading, batch: int | None, chunk: int, meter: _Meter
) -> NDArray[np.float64]:
    """Sums of the losses in each bucket, fp64 [samples, buckets]."""
    starts = reading.starts.reshape(-1)
    rows = batch or _rows_at_once(model, reading.length, chunk)
    batches = [starts[first : first + rows] for first in range(0, starts.size, rows)]
    with evaluating(model):
        sums = torch.cat([_score_batch(model, text, each, reading.edges, chunk, meter) for each in batches])
    samples: NDArray[np.float64] = sums.numpy().reshape(*reading.starts.shape, -1).sum(axis=1)
    return samples


def _score_batch(
    model: SambaLM, text: Text, starts: NDArray[np.int64], edges: tuple[int, ...], chunk: int, meter: _Meter
) -> Tensor:
    """Read one window from each start; sums of its losses in each bucket, fp64 [rows, buckets] on the CPU."""
    sums = torch.zeros(starts.size, len(edges) - 1, dtype=torch.float64, device=model.device)
    state = None
    last = edges[-1] - 1  # a target only: nothing is predicted from it
    for begin in range(0, last, chunk):
        end = min(begin + chunk, last)
        ids = torch.from_numpy(text.rows(starts + begin, end - begin + 1, model.config.vocab_size)).to(model.device)
        hidden, state = model.features(ids[:, :-1], state)
        for bucket, (low, high) in enumerate(pairwise(edges)):
            # This chunk's targets are the tokens begin + 1 .. end of the window.
            a, b = max(low - 1, begin) - begin, min(high - 1, end) - begin
            if a < b:
                sums[:, bucket] += _loss_sums(model, hidden[:, a:b], ids[:, a + 1 : b + 1])
        meter.add(starts.size * (end - begin + (end == last)))
    return sums.cpu()


def _loss_sums(model: SambaLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sums over each row of the cross-entropy of targets [B, L], fp64 [B]; never all logits at once."""
    piece = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    losses = []
    for h, t in zip(hidden.flatten(0, 1).split(piece), targets.flatten().split(piece), strict=True):
        logits = model.head(h)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses.append(F.cross_entropy(wide, t, reduction="none").double())
    return torch.cat(losses).view(targets.shape).sum(1)


def _rows_at_once(model: SambaLM, length: int, chunk: int) -> int:
    # Full attention holds every window's whole past, so its windows count in full.
    held = min(length, chunk) if model.config.constant_state else length
    return max(1, TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cpu"]) // held)


def _summarise(job: Job, sums: NDArray[np.float64], text: Text, tokenizer: Tokenizer | None) -> list[LengthResult]:
    """Results of a job whose losses sum to ``sums`` [samples, lengths]."""
    counts = sum(reading.starts.shape[1] * np.diff(reading.edges) for reading in job.readings)
    counts = np.asarray(counts)  # predictions of one sample, [lengths]
    sizes = None if tokenizer is None else _bytes(job, text, tokenizer)
    if job.cumulative:
        sums, counts = sums.cumsum(axis=1), counts.cumsum()
        sizes = None if sizes is None else sizes.cumsum()
    results = []
    for i, length in enumerate(job.lengths):
        means = sums[:, i] / counts[i]
        loss = float(means.mean())
        tokens = int(counts[i]) * means.size
        results.append(
            LengthResult(
                length=length,
                positions=job.positions[i],
                windows=means.size,
                tokens=tokens,
                loss=loss if math.isfinite(loss) else math.nan,
                standard_error=_standard_error(means),
                perplexity=_exp(loss),
                bits_per_byte=None if sizes is None or not sizes[i] else loss * tokens / (math.log(2) * sizes[i]),
                note="" if math.isfinite(loss) else _not_finite(length, means),
            )
        )
    return results


def _bytes(job: Job, text: Text, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of all targets in each bucket, int64 [buckets]."""
    sizes = np.zeros(len(job.lengths), dtype=np.int64)
    for reading in job.readings:
        for start in reading.starts.flat:
            for bucket, (low, high) in enumerate(pairwise(reading.edges)):
                sizes[bucket] += text.num_bytes(int(start) + low, int(start) + high, tokenizer)
    return sizes


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
