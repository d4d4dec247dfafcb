"""The states of the sequences that are being continued, in tensors made once."""

from __future__ import annotations

import sys

from torch import Tensor

from samba_lm.engine import fast_step
from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.span import Cursor
from samba_lm.state import State

LEAST = 256
"""Tokens to make room for at first, where the state grows."""


class Slots:
    """Room for the states of ``capacity`` sequences; those in use are the first ones, so that a step reads no index.

    Args:
        capacity: sequences at once.

    Attributes:
        used: how many there are: rows 0 .. used - 1.
        reserved: the length of text that there is room for; the largest number with constant states.
    """

    def __init__(self, model: SambaLM, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"slots={capacity} is too few: at least 1 sequence must have room.")
        self._model = model
        self._state = model.init_state(capacity)
        # What grows with the text is empty as long as nothing was read.
        self._growing = [[name for name, t in layer.items() if 0 in t.shape] for layer in self._state.layers]
        self._most = model.config.max_context
        self.reserved = 0 if any(self._growing) else sys.maxsize
        self.capacity = capacity
        self.used = 0
        self._fast: fast_step.FastStep | None = None
        self._asked = False  # whether there are kernels for the steps of this model over these tensors

    def put(self, state: State, longest: int) -> int:
        """Copy the state of one sequence, of which ``longest`` tokens were read, into the next free row."""
        assert self.used < self.capacity, "no slot is free"
        self.reserve(longest)
        self.rows(self.used, self.used + 1).copy_(state)
        self.used += 1
        return self.used - 1

    def take(self, row: int) -> State:
        """A copy of one sequence's state."""
        return self.rows(row, row + 1).fork()

    def drop(self, row: int) -> int:
        """Free a row; the last one takes its place. Returns which one that was."""
        self.used -= 1
        if row != self.used:
            self.rows(row, row + 1).copy_(self.rows(self.used, self.used + 1))
        # Steps of more rows than are used read what this one's state holds: next to nothing from now on.
        self._state.cursor.position[self.used] = 0
        return self.used

    def rows(self, begin: int, end: int) -> State:
        """Some of the rows, as views."""
        cursor = self._state.cursor
        layers = [{name: t[begin:end] for name, t in layer.items()} for layer in self._state.layers]
        return State(Cursor(cursor.segment[begin:end], cursor.position[begin:end]), layers)

    def step(self, token_ids: Tensor, longest: int) -> Tensor:
        """Read one token of each of the first rows, int64 [n], of which none has read more than ``longest``.

        There must be room for the token, see :meth:`reserve`. Logits [n, V].
        """
        if not self._asked:  # not before: parameters may have changed until now
            self._fast, self._asked = fast_step.of(self._model, self._state), True
        if self._fast is not None and token_ids.shape[0] <= fast_step.MOST_ROWS:
            return self._fast.step(token_ids)
        held = self.rows(0, token_ids.shape[0])
        moved = State(held.cursor, list(held.layers))
        logits = self._model.step(token_ids, moved, longest)
        held.copy_(moved)
        return logits

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens where the state grows with them.

        Raises UserError where full attention would need more than max_context.
        """
        if length <= self.reserved:
            return
        if length > self._most:
            raise UserError(
                f"full attention would have to hold {length} positions, but max_context is {self._most}: ask for fewer "
                "tokens, raise max_context in the model's config.json, or use a model with a window"
            )
        # Doubled, so that a growing text is moved rarely.
        self.reserved = min(max(length, 2 * self.reserved, LEAST), self._most)
        for layer, index in zip(self._state.layers, self._growing, strict=True):
            for name in index:
                tensor = layer[name]
                layer[name] = tensor.new_zeros(tensor.shape[0], self.reserved, *tensor.shape[2:])
                layer[name][:, : tensor.shape[1]] = tensor
        self._fast, self._asked = None, False  # it knew where the tensors were

    def nbytes(self) -> int:
        """Bytes held for all slots."""
        return self._state.nbytes()
