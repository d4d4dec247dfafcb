"""The texts that are being continued: each has a row of the slots, and every step gives each its next token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from samba_lm.engine.decoder import Decoder
from samba_lm.engine.report import Report
from samba_lm.engine.request import Token
from samba_lm.engine.sequence import Sequence
from samba_lm.engine.slots import Slots
from samba_lm.engine.transfer import Arriving, pinned
from samba_lm.engine.undo import Undo
from samba_lm.generation.sampling import History, Options, sample
from samba_lm.model import SambaLM
from samba_lm.state import State


class Batch:
    """See the module.

    Between two steps a GPU would wait while Python looks at what was drawn. So the next step is started before that,
    where no text needs Python for it: it reads the tokens where the step before left them. A text that turns out to
    have ended has then read a token too many: what that gave is dropped with its row, and what it did to a state that
    is to be kept is taken back.

    Args:
        whole: every step computes all slots.
        ahead: start steps before the results of the one before have been looked at.

    Attributes:
        running: the texts, in the order of their rows.
    """

    def __init__(self, model: SambaLM, vocab_size: int, slots: int, *, whole: bool, ahead: bool) -> None:
        self._model = model
        self.slots = Slots(model, slots)
        self.running: list[Sequence] = []
        self._decoder = Decoder(self.slots, vocab_size, model.device, whole=whole)
        self._vocab_size, self._ahead = vocab_size, ahead
        self._most = model.config.max_context
        self._constant = self.slots.reserved > self._most
        self._undo: Undo | None = None  # made when a text is first to be kept
        self._settled = False  # the decoder knows the options and biases of the running ones
        self._started: Step | None = None

    def first(self, one: Sequence) -> Step:
        """The token that follows what a text has read so far; it has no row yet."""
        reader = one.reader
        assert reader is not None
        assert reader.logits is not None
        device = reader.logits.device
        options = Options.of([one.request.params], self._vocab_size, device)
        bias = one.bias()[None].to(device) if one.biased else None
        position = torch.tensor([one.length], device=device)
        drawn = sample(reader.logits, options, position, reader.history, self._vocab_size, bias)
        return Step([one], [], drawn, reader.logits, self._vocab_size)

    def add(self, one: Sequence, state: State, history: History | None) -> None:
        """Give a text a row, which goes on from copies of these."""
        row = self.slots.put(state, one.length)
        if history is not None:
            self._decoder.set_history(row, history)
        self.running.append(one)
        self._settled = False

    def standing(self, row: int) -> tuple[State, History | None]:
        """Copies of where a row stands, having read all tokens but the one that it was given last."""
        one = self.running[row]
        if self._started is not None and one in self._started.running:
            assert self._undo is not None
            # Since that step began, a row that was freed may have been taken by this text.
            return self._undo.before(row, self._started.running.index(one)), None
        return self.slots.take(row), self._decoder.history(row) if one.penalised else None

    def remove(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        moved = self.slots.drop(row)
        if moved != row:
            self._decoder.move(moved, row)
            self.running[row] = self.running[moved]
        self.running.pop()
        self._settled = False
        if not self.running:
            self._started = None  # nobody is left who would look at it

    def step(self) -> Step:
        """The next token of every running text."""
        step = self._started or self._start()
        self._started = self._go_on(step) if self._may_go_on(step) else None
        return step

    def _start(self) -> Step:
        running = list(self.running)
        reading = [row for row, one in enumerate(running) if one.unread]
        ids = [one.next_token() for one in running]
        if not self._settled:
            self._decoder.set_options([one.request.params for one in running])
        if not self._settled or any(one.guided for one in running):
            biased = any(one.biased for one in running)
            self._decoder.set_bias(torch.stack([one.bias() for one in running]) if biased else None)
        self._settled = True
        positions = [one.length + 1 for one in running]
        drawn, logits = self._decoder.step(ids, positions, [row not in reading for row in range(len(running))])
        return Step(running, reading, drawn, logits, self._vocab_size)

    def _may_go_on(self, step: Step) -> bool:
        """Whether the step after this one needs nothing that is not on the device."""
        return (
            self._ahead
            and self._settled  # the rows are those of the step
            and not step.reading
            and all(one.foreseen for one in self.running)
            and (self._constant or not any(one.request.keep for one in self.running))
            and (self._constant or max(one.length for one in self.running) + 2 <= self._most)
        )

    def _go_on(self, step: Step) -> Step:
        if any(one.request.keep for one in step.running):
            self._undo = self._undo or Undo(self._model, self.slots)
            self._undo.save(len(step.running))
        drawn, logits = self._decoder.again()
        return Step(step.running, [], drawn, logits, self._vocab_size)


class Step:
    """What was started for some texts, and its results when they have come.

    Attributes:
        running: the texts as their rows were when it began; some may be over by now.
        reading: rows that read a token of their prompt.
        logits: [n, V], valid until the next step is started.
    """

    def __init__(
        self, running: list[Sequence], reading: list[int], drawn: Tensor, logits: Tensor, vocab_size: int
    ) -> None:
        self.running, self.reading, self.logits = running, reading, logits
        self._asked = [row for row, one in enumerate(running) if one.request.logprobs is not None and not one.unread]
        if self._asked:
            most = max(running[row].request.logprobs or 0 for row in self._asked)
            index = pinned(torch.tensor(self._asked), drawn.device).to(drawn.device, non_blocking=True)
            self._report = Report(logits[index], drawn[index], most, vocab_size)
        self._ids = Arriving(drawn)

    def results(self) -> list[tuple[Sequence, int, Token | None]]:
        """Each text with the token that was drawn for it, and how likely it was where that was asked for."""
        found = self._report.tokens() if self._asked else []
        reports = dict(zip(self._asked, found, strict=True))
        (ids,) = self._ids.lists()
        return [(one, ids[row], _cut(reports.get(row), one)) for row, one in enumerate(self.running)]


def _cut(token: Token | None, one: Sequence) -> Token | None:
    """With as many of the likeliest as the text asks for."""
    return None if token is None else replace(token, top=token.top[: one.request.logprobs])
