"""Which tokens of a text count at a context length, and what a model has read before each: the protocols, exactly.

A protocol chooses, before any model runs, windows that are read from a fresh state, and the targets of each that
count. Figures of two protocols are never comparable, so no result mixes them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from samba_lm.errors import UserError, did_you_mean
from samba_lm.eval.text import Text

if TYPE_CHECKING:
    from numpy.typing import NDArray

Protocol = Literal["full-window", "prefix", "last-stride", "stream", "sliding-window"]
Documents = Literal["same", "every"]
"""Of "prefix" and "stream": which documents a length is measured on. "same": those at least as long as the longest
length, so that all lengths are measured on the same text; "every": each that is long enough for the length."""
OF_DOCUMENTS = ("prefix", "stream")
"""The protocols that read documents from their beginnings; the others read over their boundaries."""

MEANING: dict[Protocol, str] = {
    "full-window": "Windows of L tokens start every STRIDE tokens of the text (by default every L). Each is read from "
    "a fresh state and all its L - 1 predictions count, made from 1 to L - 1 tokens.",
    "prefix": "The first L tokens of each document; all L - 1 predictions count, as in full-window. Every length is "
    "measured on the same documents, those at least as long as the longest length (or, with DOCUMENTS every, on each "
    "that is long enough for it).",
    "last-stride": "Windows of L tokens, each read from a fresh state; only its last STRIDE tokens count (by default "
    "half of the shortest length), seen after L - STRIDE to L - 1 tokens. Every length is scored on the same tokens.",
    "stream": "Each document is read once from its beginning, the state carried on; the row of L counts only the "
    "tokens that stand between the length before it and L. All rows come from the same documents, as in prefix.",
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
        documents: see :data:`Documents`.
    """

    protocol: Protocol
    lengths: tuple[int, ...]
    stride: int | None
    window: int | None
    max_tokens: int | None
    documents: Documents = "same"

    @classmethod
    def of(
        cls,
        protocol: str,
        lengths: Sequence[int],
        *,
        stride: int | None = None,
        window: int | None = None,
        max_tokens: int | None = None,
        documents: str = "same",
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
        if documents not in get_args(Documents):
            raise UserError(f"documents is {documents!r}: it must be same or every.")
        if protocol not in OF_DOCUMENTS and documents != "same":
            raise UserError(f"documents is {documents}, but {protocol} reads over their boundaries: leave it out.")
        if protocol in OF_DOCUMENTS and stride is not None:
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
        lengths = tuple(sorted(set(lengths)))
        return cls(cast(Protocol, protocol), lengths, stride, window, max_tokens, cast(Documents, documents))

    def facts(self) -> dict[str, object]:
        """What decides the result at one length, but for the text: results with other facts are of other tokens."""
        facts = asdict(self)
        del facts["lengths"]
        if self.protocol not in OF_DOCUMENTS:
            del facts["documents"]
        if self.protocol == "stream":  # a row begins where the one before it ends
            facts["lengths"] = list(self.lengths)
        elif self.protocol == "last-stride" or (self.protocol == "prefix" and self.documents == "same"):
            facts["longest"] = self.lengths[-1]  # it chooses the windows of all
        return facts

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
        reach: int64 [samples]: how many buckets a sample has; None: all of them.
    """

    starts: NDArray[np.int64]
    edges: tuple[int, ...]
    reach: NDArray[np.int64] | None = None

    @property
    def length(self) -> int:
        """Tokens of a window, or of the longest."""
        return self.edges[-1]

    @property
    def tokens_to_read(self) -> int:
        if self.reach is None:
            return self.starts.size * self.length
        return int(np.asarray(self.edges)[self.reach].sum()) * self.starts.shape[1]


@dataclass(frozen=True)
class Job:
    """What is measured in one go: the figures of each length in ``lengths``, over samples of equal size.

    Attributes:
        lengths: one for each bucket of the readings.
        positions: for each length, the first token of a sample that counts and one more than the last.
        readings: their sums add up; all have the same samples and the same number of buckets. Where samples have not
            all as many, there is one reading.
        cumulative: a length counts the buckets of the shorter ones too.
    """

    lengths: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]
    readings: tuple[Reading, ...]
    cumulative: bool = False

    @property
    def tokens_to_read(self) -> int:
        return sum(reading.tokens_to_read for reading in self.readings)


@dataclass(frozen=True)
class Windows:
    """What to read of a text, and why some lengths are left out (a sentence for each)."""

    jobs: tuple[Job, ...]
    skipped: dict[int, str]


def choose_windows(settings: Settings, text: Text, without: Collection[int] = ()) -> Windows:
    """Choose the windows. Where ``max_tokens`` allows only some, they are the first; for last-stride, spread evenly.

    The windows of a length do not depend on ``without``, the lengths that need not be measured.

    Raises:
        UserError: no length has enough text.
    """
    if settings.protocol in OF_DOCUMENTS:
        return _over_documents(settings, text, without)
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
    return Windows(tuple(job for job in jobs if job.lengths[0] not in without), skipped)


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


def _over_documents(settings: Settings, text: Text, without: Collection[int]) -> Windows:
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
    cumulative = settings.protocol == "prefix"
    # The rows of "stream" lie between one another's ends, so it keeps all lengths that come before one that is wanted.
    wanted = [length for length in lengths if length not in without]
    if not wanted:
        return Windows((), skipped)
    if not cumulative:
        wanted = [length for length in lengths if length <= wanted[-1]]
    reach = np.zeros(sizes.size, dtype=np.int64)
    if settings.documents == "same":
        chosen = np.flatnonzero(sizes >= lengths[-1])
        reach[chosen[: settings.samples(chosen.size, lengths[-1])]] = len(wanted)
    else:
        # The longest first, so that the documents of a length are among those of any shorter one.
        order = np.argsort(-sizes, kind="stable")
        for length in wanted:
            reach[order[: settings.samples(int((sizes >= length).sum()), length)]] += 1
    edges = (1, *wanted)
    positions = tuple((1 if cumulative else low, high) for low, high in pairwise(edges))
    chosen = np.flatnonzero(reach)
    reading = Reading(text.documents[chosen, :1], edges, None if settings.documents == "same" else reach[chosen])
    return Windows((Job(tuple(wanted), positions, (reading,), cumulative),), skipped)


def _below(limit: int, name: str, stride: int) -> int:
    # A token scored first in its window would have seen nothing.
    if stride >= limit:
        raise UserError(f"stride is {stride}: it must be less than the {name}, {limit}.")
    return stride
