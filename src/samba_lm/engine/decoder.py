"""One step of all running sequences: read a token each, draw the next. On a GPU a CUDA graph for each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from samba_lm.engine.graph import Graph
from samba_lm.engine.slots import Slots
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.sampling import History, Options, sample

GREEDY, PLAIN, CUT = "greedy", "plain", "cut"
"""What the sampler is asked for by the most demanding row; a graph is made for each where it is needed."""


class Decoder:
    """Steps over the first rows of ``slots``.

    A GPU waits longer for Python than it computes, so there a step's kernels, the sampler's too, are recorded once for
    each batch size of :func:`sizes` and then started as one. Rows between the number that run and the recorded size
    compute what nobody reads.
    """

    def __init__(self, slots: Slots, vocab_size: int, device: torch.device, *, whole: bool = False) -> None:
        """``vocab_size``: tokens that may be drawn. ``whole``: every step computes all slots."""
        self._slots, self._vocab_size, self._device = slots, vocab_size, device
        self._sizes = [slots.capacity] if whole else sizes(slots.capacity)
        self._options = Options.of([SamplingParams(temperature=0)] * slots.capacity, vocab_size, device)
        self._ids = torch.zeros(slots.capacity, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._graphs: dict[tuple[int, str, bool], Graph[tuple[Tensor, Tensor]]] = {}
        self._bias: Tensor | None = None  # made when it is first asked for
        self._reserved = slots.reserved
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def set_options(self, params: Sequence[SamplingParams]) -> None:
        """How the rows are sampled from now on, the first rows' options."""
        options = Options.of(params, self._vocab_size, self._device)
        for name, held in self._options.tensors().items():
            held[: len(params)].copy_(getattr(options, name))
        self._options = replace(self._options, greedy=options.greedy, most=options.most, cut=options.cut)

    def step(
        self, ids: Sequence[int], positions: Sequence[int], history: History | None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read one token of each of the first rows.

        Args:
            ids: the tokens. positions: the index that the drawn token of each row will have.
            history: for the penalties, of these rows; None: none has any.
            bias: fp32 [n, vocab_size] on the CPU, see :func:`samba_lm.generation.sampling.sample`.

        Returns the tokens drawn, int64 [n], and the logits [n, V] they were drawn from, valid until the next step.
        """
        count, size = len(ids), next(n for n in self._sizes if n >= len(ids))
        longest = max(positions) - 1
        self._slots.reserve(longest + 1)
        host = torch.tensor([ids, positions])
        if self._device.type == "cuda":
            host = host.pin_memory()
        self._ids[:count].copy_(host[0], non_blocking=True)
        self._positions[:count].copy_(host[1], non_blocking=True)
        if bias is not None:
            if self._bias is None:
                self._bias = torch.zeros(self._slots.capacity, self._vocab_size, device=self._device)
            bias = bias.pin_memory() if self._device.type == "cuda" else bias
            self._bias[:count].copy_(bias, non_blocking=True)
        if self._device.type == "cuda" and history is None:
            drawn, logits = self._replay(size, longest, bias is not None)
        else:
            drawn, logits = self._run(size, longest, history, count, bias is not None)
        return drawn[:count], logits[:count]

    def _run(self, size: int, longest: int, history: History | None, count: int, biased: bool) -> tuple[Tensor, Tensor]:
        logits = self._slots.step(self._ids[:size], longest)
        rows = slice(0, size if history is None else count)
        options = self._options.rows(rows)
        bias = self._bias[rows] if biased and self._bias is not None else None
        return sample(logits[rows], options, self._positions[rows], history, self._vocab_size, bias), logits

    def _replay(self, size: int, longest: int, biased: bool) -> tuple[Tensor, Tensor]:
        if self._reserved != self._slots.reserved:  # the states have moved
            self._graphs.clear()
            self._reserved = self._slots.reserved
        mode = GREEDY if self._options.greedy else CUT if self._options.cut else PLAIN
        if (size, mode, biased) not in self._graphs:
            options, self._options = self._options, replace(self._options, most=None)  # one graph for every top-k
            self._graphs[size, mode, biased] = Graph.record(
                lambda: self._run(size, longest, None, size, biased), self._slots.rows(0, size), self._pool
            )
            self._options = options
        return self._graphs[size, mode, biased].replay()


def sizes(capacity: int) -> list[int]:
    """Batch sizes that a step is made for: powers of two up to 8, then multiples of 8, and the capacity."""
    some = [n for n in (1, 2, 4, *range(8, capacity + 1, 8)) if n <= capacity]
    return sorted({*some, capacity})
