"""Reading prompts of any length in chunks and in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prompt import TokenIds, rechunk
from samba_lm.generation.sampling import History, penalised
from samba_lm.model import SambaLM
from samba_lm.state import State

OnProgress = Callable[[int], None]
"""Called after each chunk with the number of tokens read so far, over all sequences."""


@dataclass
class Reader:
    """Where B sequences stand: all that is needed to continue them."""

    state: State
    lengths: list[int]
    """Tokens read so far, of each sequence."""
    logits: Tensor | None = None
    """[B, V] of the next token; None before anything was read."""
    history: History | None = None

    @classmethod
    def create(cls, model: SambaLM, params: SamplingParams, batch: int, context: Reader | None = None) -> Reader:
        """Return `batch` sequences of which nothing was read, or copies of the one sequence of a context.

        Raises UserError when the context holds several.
        """
        history = History.create(batch, model.config.vocab_size, model.device) if penalised(params) else None
        if context is None:
            return cls(model.init_state(batch), [0] * batch, history=history)
        if len(context.lengths) != 1:
            raise UserError(f"A context of {len(context.lengths)} sequences: give one, such as context.select([0]).")
        reader = context.select([0] * batch)
        if history is not None and reader.history is not None:
            history.seen |= reader.history.seen  # all of it is prompt by now
        reader.history = history
        return reader

    def fork(self) -> Reader:
        """Return an independent copy."""
        history = None if self.history is None else self.history.fork()
        return Reader(self.state.fork(), list(self.lengths), self.logits, history)

    def select(self, rows: list[int]) -> Reader:
        """Return some of the sequences only."""
        return Reader(
            self.state.select(rows),
            [self.lengths[row] for row in rows],
            None if self.logits is None else self.logits[rows],
            None if self.history is None else self.history.select(rows),
        )


@torch.no_grad()
def prefill(
    model: SambaLM,
    prompts: Sequence[Iterable[TokenIds]],
    reader: Reader,
    chunk: int = DEFAULT_CHUNK,
    on_progress: OnProgress | None = None,
) -> None:
    """Read one prompt a sequence, each an iterable of non-empty token-id chunks, and advance `reader` in place.

    Memory does not depend on the length of the prompts: at most `chunk` tokens are held at once, over all sequences,
    and logits are computed for the last position of each only. Prompts of different lengths are padded on the right
    with tokens that no layer sees.

    Raises UserError for a token id outside the model's vocabulary; the reader is then of no further use.
    """
    last: Tensor | None = None
    before = list(reader.lengths)
    per_row = max(1, chunk // len(prompts))
    empty = np.empty(0, dtype=np.int64)
    for rows in zip_longest(*(rechunk(prompt, per_row) for prompt in prompts), fillvalue=empty):
        widths = [row.size for row in rows]
        input_ids = np.zeros((len(rows), max(widths)), dtype=np.int64)
        segments = np.full_like(input_ids, -1)
        for i, row in enumerate(rows):
            check_ids(row, model.config.vocab_size, reader.lengths[i])
            input_ids[i, : row.size] = row
            segments[i, : row.size] = 0
        ids = torch.from_numpy(input_ids).to(model.device)
        padded = min(widths) < max(widths)
        hidden, reader.state = model.features(
            ids, reader.state, torch.from_numpy(segments).to(model.device) if padded else None
        )
        ends = hidden[torch.arange(len(rows)), [max(width - 1, 0) for width in widths]]
        if last is None:
            last = ends
        else:
            read = torch.tensor(widths, device=ends.device).unsqueeze(-1) > 0
            last = torch.where(read, ends, last)
        for i, width in enumerate(widths):
            reader.lengths[i] += width
            if reader.history is not None:
                reader.history.read(i, ids[i, :width])
        if on_progress is not None:
            on_progress(sum(reader.lengths))
    if last is not None:
        logits = model.head(last)
        if reader.logits is not None and any(row == length for row, length in zip(before, reader.lengths, strict=True)):
            # Of empty prompts after a context, what comes next is known already.
            grown = torch.tensor([[row < length] for row, length in zip(before, reader.lengths, strict=True)])
            logits = torch.where(grown.to(logits.device), logits, reader.logits)
        reader.logits = logits


def check_ids(token_ids: TokenIds, vocab_size: int, offset: int) -> None:
    """Raise UserError for a token id outside the model's vocabulary; the first stands at position ``offset``."""
    outside = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
    if outside.size:
        first = int(outside[0])
        raise UserError(
            f"Token id {int(token_ids[first])} at position {offset + first} is outside the model's vocabulary of "
            f"{vocab_size} (0 to {vocab_size - 1}): use the tokenizer the model was trained with."
        )
