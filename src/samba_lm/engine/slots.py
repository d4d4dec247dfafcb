"""The states of the sequences that are being continued, in tensors made once."""

from __future__ import annotations

from torch import Tensor

from samba_lm.errors import UserError
from samba_lm.model import SambaLM
from samba_lm.span import Cursor
from samba_lm.state import State


class Slots:
    """Room for the states of ``capacity`` sequences; those in use are the first ones, so that a step reads no index.

    Args:
        capacity: sequences at once.

    Attributes:
        used: how many there are: rows 0 .. used - 1.
    """

    def __init__(self, model: SambaLM, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"slots={capacity} is too few: at least 1 sequence must have room.")
        self._model = model
        self._state = model.init_state(capacity)
        self.capacity = capacity
        self.used = 0

    def put(self, state: State, longest: int) -> int:
        """Copy the state of one sequence, of which ``longest`` tokens were read, into the next free row."""
        assert self.used < self.capacity, "no slot is free"
        self._make_room(state)
        _copy(self.rows(self.used, self.used + 1), state)
        self.used += 1
        return self.used - 1

    def take(self, row: int) -> State:
        """A copy of one sequence's state."""
        return self.rows(row, row + 1).fork()

    def drop(self, row: int) -> int:
        """Free a row; the last one takes its place. Returns which one that was."""
        self.used -= 1
        if row != self.used:
            _copy(self.rows(row, row + 1), self.rows(self.used, self.used + 1))
        return self.used

    def rows(self, begin: int, end: int) -> State:
        """Some of the rows, as views."""
        cursor = self._state.cursor
        layers = [{name: t[begin:end] for name, t in layer.items()} for layer in self._state.layers]
        return State(Cursor(cursor.segment[begin:end], cursor.position[begin:end]), layers)

    def step(self, token_ids: Tensor, longest: int) -> Tensor:
        """Read one token of each of the first rows, int64 [n], of which none has read more than ``longest``.

        Logits [n, V]. Raises UserError where full attention would need more than max_context.
        """
        before = self.rows(0, token_ids.shape[0])
        after = State(before.cursor, list(before.layers))
        logits = self._model.step(token_ids, after, longest)
        if any(a.shape[1:] != t.shape[1:] for a, t in _pairs(after, before)):
            self._make_room(after)  # full attention has grown
            before = self.rows(0, token_ids.shape[0])
        _copy(before, after)
        return logits

    def nbytes(self) -> int:
        """Bytes held for all slots."""
        return self._state.nbytes()

    def _make_room(self, like: State) -> None:
        """Let what grows (full attention's keys and values) be as long as in ``like``; the new part is zero."""
        for layer, wanted in zip(self._state.layers, like.layers, strict=True):
            for name, tensor in layer.items():
                size = wanted[name].shape[1]
                if tensor.shape[1] < size:
                    grown = tensor.new_zeros(tensor.shape[0], size, *tensor.shape[2:])
                    grown[:, : tensor.shape[1]] = tensor
                    layer[name] = grown


def _pairs(a: State, b: State) -> list[tuple[Tensor, Tensor]]:
    tensors = [(x[name], y[name]) for x, y in zip(a.layers, b.layers, strict=True) for name in x]
    return [*tensors, (a.cursor.segment, b.cursor.segment), (a.cursor.position, b.cursor.position)]


def _copy(to: State, source: State) -> None:
    """``source`` into the views ``to``, whose rings may be longer."""
    pairs = [(t, s) for t, s in _pairs(to, source) if t.data_ptr() != s.data_ptr()]
    for t, s in pairs:
        (t if t.dim() < 2 else t[:, : s.shape[1]]).copy_(s)
