"""One step of all running sequences: read a token each, draw the next. On a GPU a CUDA graph for each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from samba_lm.engine.graph import Graph
from samba_lm.engine.slots import Slots
from samba_lm.engine.transfer import pinned
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.sampling import History, Options, penalised, sample

GREEDY, PLAIN, CUT = "greedy", "plain", "cut"
"""What the sampler is asked for by the most demanding row; a graph is made for each where it is needed."""


class Decoder:
    """Steps over the first rows of ``slots``.

    A GPU waits longer for Python than it computes, so there a step's kernels, the sampler's too, are recorded once for
    each batch size of :func:`sizes` and then started as one. Rows between the number that run and the recorded size
    compute what nobody reads. A step leaves its tokens where the next one reads them, so that :meth:`again` needs
    nothing from the host.
    """

    def __init__(self, slots: Slots, vocab_size: int, device: torch.device, *, whole: bool = False) -> None:
        """``vocab_size``: tokens that may be drawn. ``whole``: every step computes all slots."""
        self._slots, self._vocab_size, self._device = slots, vocab_size, device
        self._sizes = [slots.capacity] if whole else sizes(slots.capacity)
        self._options = Options.of([SamplingParams(temperature=0)] * slots.capacity, vocab_size, device)
        # Tokens to read, the index of the token to draw, and whether the token to read was drawn, not given.
        self._rows = torch.zeros(3, slots.capacity, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, str, bool, bool], Graph[tuple[Tensor, Tensor]]] = {}
        self._bias: Tensor | None = None  # these two are made when they are first asked for
        self._history: History | None = None
        self._biased = self._penalised = False
        self._count = self._longest = 0
        self._reserved = slots.reserved
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def set_options(self, params: Sequence[SamplingParams]) -> None:
        """How the rows are sampled from now on, the first rows' options."""
        options = Options.of(params, self._vocab_size)
        for name, held in self._options.tensors().items():
            held[: len(params)].copy_(pinned(getattr(options, name), self._device), non_blocking=True)
        self._options = replace(self._options, greedy=options.greedy, cut=options.cut)
        self._penalised = any(map(penalised, params))

    def set_bias(self, bias: Tensor | None) -> None:
        """What is added to the first rows' logits from now on, fp32 [n, vocab_size] on the CPU; None: nothing.

        See :func:`samba_lm.generation.sampling.sample`.
        """
        self._biased = bias is not None
        if bias is not None:
            if self._bias is None:
                self._bias = torch.zeros(self._slots.capacity, self._vocab_size, device=self._device)
            self._bias[: len(bias)].copy_(pinned(bias, self._device), non_blocking=True)

    def set_history(self, row: int, history: History) -> None:
        """What a row's penalties know of its text so far; they learn every token that it reads from now on."""
        if self._history is None:
            width = history.seen.shape[1]
            self._history = History.create(self._slots.capacity, width, self._device)
        self._history.seen[row] = history.seen[0]
        self._history.counts[row] = history.counts[0]

    def history(self, row: int) -> History:
        """A copy of what :meth:`set_history` was given and has learned."""
        assert self._history is not None
        return self._history.select([row])

    def move(self, source: int, to: int) -> None:
        """A row has moved; its options, bias and token are to be told anew."""
        if self._history is not None:
            self._history.seen[to] = self._history.seen[source]
            self._history.counts[to] = self._history.counts[source]

    def step(
        self, ids: Sequence[int], positions: Sequence[int], drawn: Sequence[bool] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read one token of each of the first rows.

        Args:
            ids: the tokens. positions: the index that the drawn token of each row will have.
            drawn: whether the token is part of the answer, not the prompt; None: all are.

        Returns the tokens drawn, int64 [n], and the logits [n, V] they were drawn from, valid until the next step.
        """
        self._count, self._longest = len(ids), max(positions) - 1
        host = torch.zeros(self._rows.shape, dtype=torch.int64)
        host[:, : len(ids)] = torch.tensor([ids, positions, [1] * len(ids) if drawn is None else drawn])
        self._rows.copy_(pinned(host, self._device), non_blocking=True)
        return self._step()

    def again(self) -> tuple[Tensor, Tensor]:
        """As :meth:`step`, but each row reads the token that it drew in the step before; nothing is waited for.

        Nothing may have changed since, and that step, too, must have read only tokens that were drawn.
        """
        self._longest += 1
        return self._step()

    def _step(self) -> tuple[Tensor, Tensor]:
        self._slots.reserve(self._longest + 1)
        size = next(n for n in self._sizes if n >= self._count)
        drawn, logits = self._run(size) if self._pool is None else self._replay(size)
        return drawn[: self._count], logits[: self._count]

    def _run(self, size: int) -> tuple[Tensor, Tensor]:
        ids, positions, made = self._rows[:, :size]
        history = None
        if self._penalised and self._history is not None:
            history = History(self._history.seen[:size], self._history.counts[:size])
            history.add(ids, made)
        logits = self._slots.step(ids, self._longest)
        bias = self._bias[:size] if self._biased and self._bias is not None else None
        drawn = sample(logits, self._options.rows(slice(size)), positions, history, self._vocab_size, bias)
        ids.copy_(drawn.clamp(min=0))  # instead of NOT_FINITE some token, as the next step is not to fail
        positions.add_(1)
        return drawn, logits

    def _replay(self, size: int) -> tuple[Tensor, Tensor]:
        if self._reserved != self._slots.reserved:  # the states have moved
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()  # one whose graphs are gone takes no new ones
            self._reserved = self._slots.reserved
        mode = GREEDY if self._options.greedy else CUT if self._options.cut else PLAIN
        key = size, mode, self._biased, self._penalised
        if key not in self._graphs:
            moved = [*self._slots.rows(0, size).tensors(), self._rows]
            if self._penalised and self._history is not None:
                moved += [self._history.seen, self._history.counts]
            self._graphs[key] = Graph.record(lambda: self._run(size), moved, self._pool)
        return self._graphs[key].replay()


def sizes(capacity: int) -> list[int]:
    """Batch sizes that a step is made for: powers of two up to 8, then multiples of 8, and the capacity."""
    some = [n for n in (1, 2, 4, *range(8, capacity + 1, 8)) if n <= capacity]
    return sorted({*some, capacity})
