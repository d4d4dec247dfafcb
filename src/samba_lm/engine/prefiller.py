"""Reading prompts in pieces of few fixed lengths, on a GPU each as a CUDA graph: it would wait for Python otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from samba_lm.engine.graph import Graph
from samba_lm.generation.prefill import Reader, check_ids, prefill
from samba_lm.generation.prompt import TokenIds
from samba_lm.model import SambaLM
from samba_lm.span import Cursor, Span
from samba_lm.state import State

LENGTHS = (16, 64, 256, 1024, 2048)
"""Of pieces; a shorter one is filled up with tokens that no layer sees, which costs little where time is Python's."""
FAR = 1 << 62
"""No text is so long: how far a window looks back is then the window's length."""


class Prefiller:
    """Reads one prompt after the other, each in pieces; see :meth:`read`.

    Args:
        longest: tokens that a piece has at most. With ``graphs`` False, or a state that grows with the text, every
            piece is read as it is.
    """

    def __init__(self, model: SambaLM, longest: int, *, graphs: bool) -> None:
        self._model = model
        self._lengths = [n for n in LENGTHS if n < longest] + [longest]
        self._state = model.init_state(1) if graphs else None
        device = model.device
        self._ids = torch.zeros(1, longest, dtype=torch.int64, device=device)
        self._count = torch.ones(1, dtype=torch.int64, device=device)
        self._graphs: dict[int, Graph[Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and graphs else None

    def read(self, reader: Reader, tokens: TokenIds) -> None:
        """Read a piece, not empty, and move ``reader`` (one sequence) on in place.

        The reader's state is the prefiller's own memory until it reads another prompt: copy what is to be kept. Raises
        UserError for a token id outside the vocabulary.
        """
        if self._state is None:
            prefill(self._model, [[tokens]], reader, tokens.size)
            return
        check_ids(tokens, self._model.config.vocab_size, reader.lengths[0])
        if reader.state is not self._state:
            self._state.copy_(reader.state)
            reader.state = self._state
        size = next(n for n in self._lengths if n >= tokens.size)
        ids = torch.from_numpy(tokens.astype("int64"))
        self._ids[0, : tokens.size].copy_(ids, non_blocking=True)
        self._count.fill_(tokens.size)
        reader.logits = self._replay(size).clone()
        reader.lengths[0] += tokens.size
        if reader.history is not None:
            reader.history.read(0, self._ids[0, : tokens.size])

    def _replay(self, size: int) -> Tensor:
        """Logits [1, V] after the tokens that count."""
        if self._pool is None:
            return self._run(size)
        if size not in self._graphs:
            assert self._state is not None
            self._graphs[size] = Graph.record(lambda: self._run(size), self._state.tensors(), self._pool)
        return self._graphs[size].replay()

    def _run(self, size: int) -> Tensor:
        state = self._state
        assert state is not None
        cursor = Cursor(state.cursor.segment.clone(), state.cursor.position.clone())
        span = Span.padded(cursor, size, self._count, FAR)
        hidden, after = self._model.run(self._ids[:, :size], State(cursor, state.layers), span)
        state.copy_(after)
        return self._model.head(hidden[0].index_select(0, self._count - 1))
