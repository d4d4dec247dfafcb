"""The contract of every token mixer: full = chunked = one by one; packed documents = apart; constant state."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from samba_lm.nn.init import Init
from samba_lm.span import Cursor, Span

Tensors = dict[str, torch.Tensor]


class Mixer(nn.Module):
    """Base class. A subclass writes :meth:`mix`, :meth:`init_tensors` and :meth:`reset_parameters`.

    It is built from ``(spec, config)``: its layer spec and the ModelConfig it is part of.
    """

    reads_parts: ClassVar[bool] = False
    """Asks the span for what precedes its tokens (``Span.before``, ``Span.entered``, ``kv_cache.past``), or needs none
    of it: then several processes may share a row, each reading a part."""

    recurrent: ClassVar[bool] = True
    """What was read stays in a state, also where no window reaches it any more."""

    @property
    def reach(self) -> int | None:
        """How many tokens back it looks at keys: 0, not at all. None: however many there are."""
        return 0

    def forward(
        self, x: torch.Tensor, state: Tensors | None = None, segments: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Tensors]:
        """Mix x [B, L, D] over time, from ``state`` (None: nothing read yet).

        segments: int64 [B, L] document ids, non-decreasing, -1 for padding (no state update, no attention; the output
        there is undefined but finite); a first id equal to the state's last continues that document; positions restart
        with each document. None: all tokens continue the current document.

        Returns y [B, L, D] and the new state: a dict of tensors with the batch first, among them ``segment`` and
        ``position`` (int64 [B]). The given state is left as it was. Differentiable in x and in the state.
        """
        batch, length, _ = x.shape
        start = None if state is None else Cursor(state["segment"], state["position"])
        span = Span.of(batch, length, x.device, start, segments)
        if state is None:
            state = self.init_state(batch, x.device, x.dtype)
        y, tensors = self.mix(span.pack(x), state, span)
        return span.unpack(y), {**tensors, "segment": span.end.segment, "position": span.end.position}

    def init_state(self, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensors:
        """The state of ``batch`` sequences of which nothing was read. ``dtype`` is the activations'; sums stay fp32."""
        cursor = Cursor.fresh(batch, device)
        tensors = self.init_tensors(batch, torch.device(device), dtype)
        return {**tensors, "segment": cursor.segment, "position": cursor.position}

    def mix(self, x: torch.Tensor, tensors: Tensors, span: Span) -> tuple[torch.Tensor, Tensors]:
        """The layer itself: x [B, L, D] with padding at the right, its state's tensors, where the tokens stand."""
        raise NotImplementedError

    def init_tensors(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Zero state of ``batch`` sequences, batch first in every tensor; {} for a layer without state."""
        raise NotImplementedError

    def reset_parameters(self, init: Init) -> None:
        """Initialise every parameter by the model's rules."""
        raise NotImplementedError


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Recurrent sums are kept in fp32, or fp64 when the activations are."""
    return torch.float64 if dtype == torch.float64 else torch.float32
