"""Which tokens of a text count at a context length, and what a model has read before each: the protocols, exactly.

A protocol chooses, before any model runs, windows that are read from a fresh state, and the targets of each that
count. Figures of two protocols are never comparable, so no result mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from samba_lm.errors import UserError, did_you_mean
from samba_lm.eval.text import Text

if TYPE_CHECKING:
    from numpy.typing import NDArray

Protocol = Literal["full-window", "prefix", "last-stride", "stream", "sliding-window"]

MEANING: dict[Protocol, str] = {
    "full-window": "Windows of L tokens start every STRIDE tokens of the text (by default every L). Each is read from "
    "a fresh state and all its L - 1 predictions count, made from 1 to L - 1 tokens.",
    "prefix": "The first L tokens of each document; all L - 1 predictions count, as in full-window. Every length is "
    "measured on the same documents, those at least as long as the longest length.",
    "last-stride": "Windows of L tokens, each read from a fresh state; only its last STRIDE tokens count (by default "
    "half of the shortest length), seen after L - STRIDE to L - 1 tokens. Every length is scored on the same tokens.",
    "stream": "Each document is read once from its beginning, the state carried on; the row of L counts only the "
    "tokens that stand between the length before it and L. All rows come from the same documents, those at least as "
    "long as the longest length.",
    "sliding-window": "Texts of L tokens, read in windows of at most WINDOW tokens that advance by STRIDE (by default "
    "half of WINDOW). Each token counts once, in the first window that reaches it: beyond the first window it has seen "
    "WINDOW - STRIDE to WINDOW - 1 tokens, however large L. For models that cannot read further than WINDOW.",
}
"""What each protocol measures, for people."""


@dataclass(frozen=True)
class Settings:
    """A protocol with its settings checked and filled in: everything, but for the text, that decides what counts.

    Attributes:
        protocol: see :data:`MEANING`.
        lengths: context lengths in tokens, rising, each at least 2.
        stride: tokens; None where the protocol has none, or for "full-window" when it is each length itself.
        window: tokens; for "sliding-window" only.
        max_tokens: bounds (windows) x (length) at each length, though one window is always read; None: all the text.
    """

    protocol: Protocol
    lengths: tuple[int, ...]
    stride: int | None
    window: int | None
    max_tokens: int | None

    @classmethod
    def of(
        cls,
        protocol: str,
        lengths: Sequence[int],
        *,
        stride: int | None = None,
        window: int | None = None,
        max_tokens: int | None = None,
    ) -> Settings:
        """Raises UserError for values that no protocol, or not this one, can work with."""
        known = get_args(Protocol)
        if protocol not in known:
            raise UserError(f"Unknown protocol {protocol!r}.{did_you_mean(protocol, known)}")
        if not lengths or min(lengths) < 2:
            raise UserError(f"lengths are {list(lengths)}: give at least one, each of 2 tokens or more.")
        for name, value in (("stride", stride), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if protocol in ("prefix", "stream") and stride is not None:
            raise UserError(f"stride is {stride}, but {protocol} has none: leave it out.")
        if window is not None and protocol != "sliding-window":
            raise UserError(f"window is {window}, but {protocol} has none: leave it out, or use sliding-window.")
        if window is None and protocol == "sliding-window":
            raise UserError("sliding-window needs a window: give the number of tokens the model was trained on.")
        if window is not None:
            stride = _below(window, "window", max(1, window // 2) if stride is None else stride)
        elif protocol == "last-stride":
            shortest = min(lengths)
            stride = _below(shortest, "shortest length", shortest // 2 if stride is None else stride)
        return cls(cast(Protocol, protocol), tuple(sorted(set(lengths))), stride, window, max_tokens)

    def samples(self, available: int, length: int) -> int:
        """How many of ``available`` windows (or texts, or documents) to measure."""
        return available if self.max_tokens is None else min(available, max(1, self.max_tokens // length))


@dataclass(frozen=True)
class Reading:
    """Windows that are read alike, each from a fresh state.

    Attributes:
        starts: int64 [samples, windows]: where they start in the text. The windows of one sample add up.
        edges: rising; the tokens ``edges[j] .. edges[j + 1] - 1`` of a window, counted from its start, are targets of
            bucket j. The window is read as far as its last target.
    """

    starts: NDArray[np.int64]
    edges: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.edges[-1]


@dataclass(frozen=True)
class Job:
    """What is measured in one go: the figures of each length in ``lengths``, over samples of equal size.

    Attributes:
        lengths: one for each bucket of the readings.
        positions: for each length, the first token of a sample that counts and one more than the last.
        readings: their sums add up; all have the same samples and the same number of buckets.
        cumulative: a length counts the buckets of the shorter ones too.
    """

    lengths: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]
    readings: tuple[Reading, ...]
    cumulative: bool = False

    @property
    def tokens_to_read(self) -> int:
        return sum(reading.starts.size * reading.length for reading in self.readings)


@dataclass(frozen=True)
class Windows:
    """What to read of a text, and why some lengths are left out (a sentence for each)."""

    jobs: tuple[Job, ...]
    skipped: dict[int, str]


def choose_windows(settings: Settings, text: Text) -> Windows:
    """Choose the windows. Where ``max_tokens`` allows only some, they are the first; for last-stride, spread evenly.

    Raises:
        UserError: no length has enough text.
    """
    if settings.protocol in ("prefix", "stream"):
        return _over_documents(settings, text)
    lengths = tuple(length for length in settings.lengths if length <= text.size)
    if not lengths:
        raise UserError(
            f"The text has {text.size} tokens, fewer than the shortest length, {settings.lengths[0]}: give more text "
            "or a shorter length."
        )
    skipped = {
        length: f"length {length:,} needs that many tokens, and the text has {text.size:,}"
        for length in settings.lengths
        if length not in lengths
    }
    match settings.protocol:
        case "full-window":
            jobs = [_full_window(settings, length, text.size) for length in lengths]
        case "last-stride":
            jobs = _last_stride(settings, lengths, text.size)
        case _:
            jobs = [_sliding_window(settings, length, text.size) for length in lengths]
    return Windows(tuple(jobs), skipped)


def _full_window(settings: Settings, length: int, size: int) -> Job:
    starts = np.arange(0, size - length + 1, settings.stride or length)
    starts = starts[: settings.samples(starts.size, length)]
    return Job((length,), ((1, length),), (Reading(starts[:, None], (1, length)),))


def _last_stride(settings: Settings, lengths: tuple[int, ...], size: int) -> list[Job]:
    stride, longest = settings.stride, lengths[-1]
    assert stride is not None
    ends = np.arange(longest, size + 1, stride)
    samples = settings.samples(ends.size, longest)
    # Neighbours share almost all their context: the same number spread out says more.
    ends = ends[np.arange(samples) * ends.size // samples]
    return [
        Job((length,), ((length - stride, length),), (Reading(ends[:, None] - length, (length - stride, length)),))
        for length in lengths
    ]


def _sliding_window(settings: Settings, length: int, size: int) -> Job:
    window, stride = settings.window, settings.stride
    assert window is not None
    assert stride is not None
    texts = np.arange(settings.samples(size // length, length))[:, None] * length
    readings = [Reading(texts, (1, min(window, length)))]
    moves, rest = divmod(max(0, length - window), stride)
    if moves:
        readings.append(Reading(texts + stride * np.arange(1, moves + 1), (window - stride, window)))
    if rest:
        readings.append(Reading(texts + length - window, (window - rest, window)))
    return Job((length,), ((1, length),), tuple(readings))


def _over_documents(settings: Settings, text: Text) -> Windows:
    """One pass over each document serves all lengths: a causal model's losses do not depend on what follows."""
    sizes = text.documents[:, 1] - text.documents[:, 0]
    most = int(sizes.max())
    lengths = tuple(length for length in settings.lengths if length <= most)
    if not lengths:
        raise UserError(
            f"The longest of {sizes.size} document(s) has {most} tokens ({text.size} in all), fewer than the shortest "
            f"length, {settings.lengths[0]}: give longer documents or a shorter length, or use full-window, which "
            "reads over their boundaries."
        )
    skipped = {
        length: f"length {length:,} needs a document of that many tokens, and the longest has {most:,}"
        for length in settings.lengths
        if length not in lengths
    }
    starts = text.documents[sizes >= lengths[-1], 0]
    starts = starts[: settings.samples(starts.size, lengths[-1])]
    cumulative = settings.protocol == "prefix"
    edges = (1, *lengths)
    positions = tuple((1 if cumulative else low, high) for low, high in pairwise(edges))
    return Windows((Job(lengths, positions, (Reading(starts[:, None], edges),), cumulative),), skipped)


def _below(limit: int, name: str, stride: int) -> int:
    # A token scored first in its window would have seen nothing.
    if stride >= limit:
        raise UserError(f"stride is {stride}: it must be less than the {name}, {limit}.")
    return stride
