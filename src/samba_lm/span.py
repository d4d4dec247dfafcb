"""Where each token of a batch stands: its document, its position in it, whether it is padding."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from samba_lm.errors import UserError
from samba_lm.neighbours import Neighbours
from samba_lm.ops.rope import rope_angles

T = TypeVar("T")


@dataclass(frozen=True)
class Cursor:
    """Where sequences stand between calls: the id of the document being read and the number of its tokens read so far.

    Both int64 [B]. A fresh cursor stands at the start of document 0.
    """

    segment: torch.Tensor
    position: torch.Tensor

    @classmethod
    def fresh(cls, batch: int, device: torch.device | str) -> Cursor:
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zeros, zeros.clone())


@dataclass(frozen=True)
class Span:
    """One call's tokens, padding moved to the right end of each row.

    Built once a call by :meth:`of` and shared by all layers.
    """

    length: int
    start: Cursor
    end: Cursor
    positions: torch.Tensor
    """int64 [B, L] position of each token in its document; [1, L] when all rows agree."""
    documents: torch.Tensor | None = None
    """int64 [B, L] number of the token's document within its row: 0 continues the state's document. None: all do."""
    lengths: torch.Tensor | None = None
    """int64 [B] tokens that are not padding. None: no padding."""
    order: torch.Tensor | None = None
    """int64 [B, L] where each packed column came from, when padding had to be moved to the right."""
    longest: int | None = None
    """No row starts further on, where that is known; otherwise who needs it asks the device, and waits for it."""
    in_place: bool = False
    """Caches may be written in place: the caller gives the old state away."""
    keep: bool = True
    """The state after the call is wanted. If not, what a layer gives back as its state may be anything."""
    neighbours: Neighbours | None = None
    """The tokens are a part of rows whose other parts these processes hold, padding at the rows' right ends. What
    precedes a part comes from them, and no layer's state counts. None: what precedes is in the state."""
    times: torch.Tensor | None = None
    """fp32 [B, L] how many of its kind each token is to Mamba's states, at least 1. None: one."""
    apart: torch.Tensor | None = None
    """int64 [B, L], never less than to the left: attention looks only at keys of its own number. None: they all have
    one."""
    _made: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        batch: int,
        length: int,
        device: torch.device,
        start: Cursor | None,
        segments: torch.Tensor | None,
        in_place: bool = False,
        keep: bool = True,
        longest: int | None = None,
        neighbours: Neighbours | None = None,
    ) -> Span:
        """Read ``segments`` (int64 [B, L] document ids or None) from where ``start`` stands (None: a fresh cursor).

        ``segments`` may lie on the CPU, whatever ``device`` is. ``longest``: the largest starting position, if known.
        """
        if neighbours is not None:
            # What a row's earlier parts may hold of its document.
            longest = neighbours.index * length
        steps = torch.arange(length, device=device)
        begin = Cursor.fresh(batch, device) if start is None else start
        longest = 0 if start is None and neighbours is None else longest
        if segments is None:
            uniform = start is None or batch == 1 or _agree(start.position)
            positions = steps[None] + (begin.position[:1, None] if uniform else begin.position[:, None])
            end = Cursor(begin.segment, begin.position + length)
            return cls(
                length, begin, end, positions, longest=longest, in_place=in_place, keep=keep, neighbours=neighbours
            )
        return cls._packed(begin, _checked(segments, batch, length), steps, longest, in_place, keep, neighbours)

    @classmethod
    def padded(cls, start: Cursor, length: int, lengths: torch.Tensor, longest: int) -> Span:
        """``length`` tokens of which the first ``lengths`` (int64 [B]) count and go on from ``start``, of which no row
        is further than ``longest``. Made without waiting for the device."""
        positions = start.position[:, None] + torch.arange(length, device=lengths.device)
        end = Cursor(start.segment, start.position + lengths)
        return cls(length, start, end, positions, lengths=lengths, longest=longest)

    @classmethod
    def _packed(
        cls,
        start: Cursor,
        segments: torch.Tensor,
        steps: torch.Tensor,
        longest: int | None,
        in_place: bool,
        keep: bool,
        neighbours: Neighbours | None,
    ) -> Span:
        padding = segments < 0
        # Asked where the segments lie: on the CPU, a GPU that has work queued is not waited for.
        padded = bool(padding.any())
        scattered = padded and bool((padding[:, :-1] & ~padding[:, 1:]).any())
        segments = segments.to(steps.device, non_blocking=True)
        order = lengths = None
        if padded:
            padding = segments < 0
            lengths = (~padding).sum(1)
            if scattered:
                assert neighbours is None, "padding goes to the right end of whole rows: samba_lm.data.columns"
                order = padding.to(torch.int8).argsort(dim=1, stable=True)
                segments = segments.gather(1, order)
        previous = torch.cat((start.segment[:, None], segments[:, :-1]), dim=1)
        boundary = segments != previous  # padding (id -1) forms one last document of its own
        documents = boundary.cumsum(1)
        first = torch.where(boundary, steps, -1).cummax(1).values
        positions = torch.where(first >= 0, steps - first, steps + start.position[:, None])
        if lengths is None:
            end = Cursor(segments[:, -1], positions[:, -1] + 1)
        else:
            last = (lengths - 1).clamp(min=0)[:, None]
            read = lengths > 0
            end = Cursor(
                torch.where(read, segments.gather(1, last)[:, 0], start.segment),
                torch.where(read, positions.gather(1, last)[:, 0] + 1, start.position),
            )
        return cls(
            steps.shape[0], start, end, positions, documents, lengths, order, longest, in_place, keep, neighbours
        )

    @cached_property
    def longest_past(self) -> int:
        """How far back any row's document reaches, at most. 0 when nothing was read yet."""
        return int(self.start.position.max()) if self.longest is None else self.longest

    @property
    def seen(self) -> torch.Tensor | None:
        """int64 [B, L]: as ``documents``, of what attention sees as one. It may begin above 0 where keys precede it."""
        if self.apart is None or self.documents is None:
            return self.documents if self.apart is None else self.apart
        return self.documents + self.apart  # neither is ever less than to the left

    @property
    def resets(self) -> torch.Tensor | None:
        """bool [B, L]: a document starts at this token. None: none does."""
        return None if self.documents is None else (self.positions == 0) & (self.documents > 0)

    def before(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The inputs before the span's x [B, L, ...], [B, P, ...]: ``state``, or as many of the part to the left."""
        return state if self.neighbours is None else self.neighbours.from_left(x, state.shape[1])

    def entered(self, state: torch.Tensor, effect: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The state [B, ...] that a recurrence reads the span from: ``state``, or what the parts before it make.

        effect: gives the span's effect on a state, ``final`` and ``kept`` as ``Neighbours.carry`` takes them, no matter
        whether a document begins within the span (which keeps nothing of what was before).
        """
        if self.neighbours is None:
            return state
        final, kept = effect()
        resets = self.resets
        if resets is not None:
            kept = kept.masked_fill(resets.any(1).view(-1, *(1,) * (kept.dim() - 1)), 0.0)
        return self.neighbours.carry(final, kept)

    @property
    def tap_positions(self) -> torch.Tensor | None:
        """Positions for convolutions, whose taps may not reach into another document. None: there is only one."""
        return None if self.documents is None else self.positions

    def angles(self, dim: int, base: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of RoPE for heads, [B or 1, L, 1, dim/2], from fp64 angles; computed once a call."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            cos, sin = rope_angles(self.positions, dim, base)
            return cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)

        return self.once(("angles", dim, base, dtype), make)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, made by the first layer of a call that asks for it and shared by the others."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Move the padding of x [B, L, ...] to the right end of each row."""
        return x if self.order is None else x.gather(1, _like(self.order, x))

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`pack`."""
        if self.order is None:
            return x
        return torch.empty_like(x).scatter(1, _like(self.order, x), x)

    def in_chunks(self, size: int) -> Span:
        """The same tokens with every ``size`` positions of a document made a document of their own (Mega's chunks).

        Computed once a call, as the angles are.
        """
        return self.once(("chunks", size), lambda: self._in_chunks(size))

    def _in_chunks(self, size: int) -> Span:
        batch = self.start.position.shape[0]
        positions = self.positions.expand(batch, -1)
        documents = torch.zeros_like(positions) if self.documents is None else self.documents
        chunk = positions // size
        # The chunk that the state stands in; a document whose last chunk is full goes on in a new one.
        begin = (self.start.position // size)[:, None]
        new = torch.cat((chunk[:, :1] != begin, chunk[:, 1:] != chunk[:, :-1]), dim=1)
        new |= torch.cat((documents[:, :1] != 0, documents[:, 1:] != documents[:, :-1]), dim=1)
        start = Cursor(self.start.segment, self.start.position % size)
        # A full chunk ends at position `size`, not 0: its keys are still the last ones read.
        end = Cursor(self.end.segment, torch.where(self.end.position > 0, (self.end.position - 1) % size + 1, 0))
        return Span(
            self.length,
            start,
            end,
            positions % size,
            new.cumsum(1),
            self.lengths,
            longest=min(self.longest_past, size),
            in_place=self.in_place,
            keep=self.keep,
            neighbours=self.neighbours,
            apart=self.apart,
        )


def _agree(position: torch.Tensor) -> bool:
    # Not asked on a GPU, where the answer would stall the queue.
    return position.device.type == "cpu" and bool((position == position[0]).all())


def _checked(segments: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    if not isinstance(segments, torch.Tensor):
        raise UserError(f"segments must be an int64 tensor [{batch}, {length}], not {type(segments).__name__}")
    if segments.shape != (batch, length) or segments.dtype != torch.int64:
        raise UserError(
            f"segments must be int64 of shape [{batch}, {length}] like the tokens, "
            f"not {segments.dtype} of shape {list(segments.shape)}"
        )
    if segments.device.type == "cpu":
        ids = torch.where(segments < 0, torch.iinfo(torch.int64).min, segments).cummax(1).values
        if bool(((segments >= 0) & (segments < ids)).any()):
            raise UserError("segments must not decrease along a row (document ids in reading order, -1 for padding)")
    return segments


def _like(order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return order.view(*order.shape, *(1,) * (x.dim() - 2)).expand_as(x)
