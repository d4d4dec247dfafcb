"""The state of sequences being read: what a model remembers, of constant size unless it has full attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from samba_lm.errors import UserError
from samba_lm.span import Cursor

Tensors = dict[str, torch.Tensor]


@dataclass
class State:
    """Where each of B sequences stands, and one dict of tensors (batch first) for every layer."""

    cursor: Cursor
    layers: list[Tensors]

    @property
    def batch(self) -> int:
        return self.cursor.position.shape[0]

    @property
    def position(self) -> torch.Tensor:
        """int64 [B]: tokens read so far of each sequence's current document."""
        return self.cursor.position

    def select(self, rows: torch.Tensor | list[int]) -> State:
        """A copy with the given rows, in that order; a row may come twice (fork one prompt into many)."""
        index = torch.as_tensor(rows, device=self.cursor.position.device)
        if index.dtype != torch.int64 or index.dim() != 1:
            raise UserError(f"rows must be a list of row numbers (int64 [n]), not {index.dtype} {list(index.shape)}")
        cursor = Cursor(self.cursor.segment[index], self.cursor.position[index])
        return State(cursor, [{name: t[index] for name, t in layer.items()} for layer in self.layers])

    def fork(self) -> State:
        """A copy that goes its own way."""
        return self.select(list(range(self.batch)))

    def copy_(self, source: State) -> None:
        """Take over the contents of a state of as many sequences; tensors that the two share are left alone.

        Of rings of different length, none of which is full then, the common part is copied.
        """
        # By their names: a file's may stand in another order.
        layers = [
            {name: theirs[name] for name in mine} for mine, theirs in zip(self.layers, source.layers, strict=True)
        ]
        for to, given in zip(self.tensors(), State(source.cursor, layers).tensors(), strict=True):
            if to.data_ptr() == given.data_ptr():
                continue
            if to.dim() == 1:
                to.copy_(given)
            else:
                common = min(to.shape[1], given.shape[1])
                to[:, :common].copy_(given[:, :common])

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, those of the layers first."""
        return [*(t for layer in self.layers for t in layer.values()), self.cursor.segment, self.cursor.position]
