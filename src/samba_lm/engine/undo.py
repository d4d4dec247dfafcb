"""Taking back the token that a text has read too many, when it turns out to have ended before."""

from __future__ import annotations

import torch
from torch import Tensor

from samba_lm.engine.slots import Slots
from samba_lm.mixers.attention import AttentionMixer
from samba_lm.model import Layer, SambaLM
from samba_lm.span import Cursor
from samba_lm.state import State, Tensors


class Undo:
    """What the newest step has overwritten in the states of the first rows, which have one size however long a text is.

    A ring of keys need not be copied: it holds position p in slot p modulo its length, so that of a text that goes back
    to position p that slot is the next to be written, and too old to be looked at before.
    """

    def __init__(self, model: SambaLM, slots: Slots) -> None:
        self._slots = slots
        rows = slots.rows(0, slots.capacity)
        self._cursor = Cursor(rows.cursor.segment.clone(), rows.cursor.position.clone())
        self._layers: list[Tensors] = []
        for layer, tensors in zip(model.layers, rows.layers, strict=True):
            assert isinstance(layer, Layer)
            rings = ("k", "v") if type(layer.mixer) is AttentionMixer else ()
            self._layers.append({name: torch.empty_like(t) for name, t in tensors.items() if name not in rings})

    def save(self, count: int) -> None:
        """Before a step: keep what it will overwrite in this many rows."""
        rows = self._slots.rows(0, count)
        pairs = [
            (kept[name][:count], tensors[name])
            for kept, tensors in zip(self._layers, rows.layers, strict=True)
            for name in kept
        ]
        pairs += [
            (self._cursor.segment[:count], rows.cursor.segment),
            (self._cursor.position[:count], rows.cursor.position),
        ]
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for kept, now in pairs:
            to, source = by_type.setdefault(kept.dtype, ([], []))
            to.append(kept)
            source.append(now)
        for to, source in by_type.values():
            torch._foreach_copy_(to, source)  # as one kernel, not one for each layer

    def before(self, row: int, then: int) -> State:
        """A copy of the state that the text in a row had before the step, when it was in the row ``then``."""
        state, held = self._slots.take(row), slice(then, then + 1)
        for tensors, kept in zip(state.layers, self._layers, strict=True):
            tensors.update({name: t[held].clone() for name, t in kept.items()})
        return State(Cursor(self._cursor.segment[held].clone(), self._cursor.position[held].clone()), state.layers)
