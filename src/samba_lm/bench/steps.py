"""Decoding steps through the engine's own parts, timed at any length of text without reading one."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from samba_lm.bench.gpu import Laps, Timing
from samba_lm.engine import fast_step
from samba_lm.engine.decoder import Decoder
from samba_lm.engine.slots import Slots
from samba_lm.engine.transfer import Arriving
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.sampling import require_finite
from samba_lm.model import SambaLM

GREEDY = SamplingParams(temperature=0)
WARM_UP = 3
"""Steps before those that are timed; the first records the CUDA graph."""


class Steps:
    """Up to ``batch`` texts in an engine's slots, of whatever length is wanted: their states hold random numbers.

    A step reads every key and value that a window or a cache holds, whatever they are, so that random ones cost as much
    as those of a text. ``model``: its parameters may not change from now on.

    Attributes:
        plain: why steps are ``model.step``'s and not those of the kernels made for it; "" if they are the kernels'.
    """

    def __init__(self, model: SambaLM, batch: int) -> None:
        model.fix_parameters()
        self.device, self.batch = model.device, batch
        self.slots = Slots(model, batch)
        self.decoder = Decoder(self.slots, model.config.vocab_size, model.device)
        self.plain = fast_step.why_not(model) if fast_step.runs_on(model.device) else "no GPU that they run on"
        self._ids = np.random.default_rng(0).integers(0, model.config.vocab_size, batch).tolist()

    def sampled(self, params: SamplingParams) -> None:
        """How tokens are drawn from now on."""
        self.decoder.set_options([params] * self.batch)

    @torch.inference_mode()
    def fill(self, room: int) -> None:
        """Make room for texts of ``room`` tokens, and fill all states with normal random numbers of variance 1."""
        self.slots.reserve(room)
        for layer in self.slots.rows(0, self.batch).layers:
            for tensor in layer.values():
                tensor.normal_()

    @torch.inference_mode()
    def clear(self) -> None:
        """Nothing was read."""
        for layer in self.slots.rows(0, self.batch).layers:
            for tensor in layer.values():
                tensor.zero_()
        self.stand(0)

    @torch.inference_mode()
    def stand(self, context: int) -> None:
        """Say that each text has ``context`` tokens."""
        self.slots.rows(0, self.batch).cursor.position.fill_(context)

    @torch.inference_mode()
    def queued(self, batch: int, context: int, count: int) -> Timing:
        """Times of ``count`` steps of the first ``batch`` texts, from ``context`` tokens on.

        Each is started behind the one before and nothing is waited for, so that these are the GPU's times as long as
        Python is quicker.
        """
        self.stand(context)
        laps = Laps(self.device)
        for i in range(count):
            laps.mark()
            self._start(batch, context) if i == 0 else self.decoder.again()
        laps.mark()
        return laps.timing()

    @torch.inference_mode()
    def answered(self, batch: int, context: int, count: int) -> Timing:
        """As :meth:`queued`, but from token to token as Python sees them, the engine's way: the next step is started,
        then the tokens of this one are waited for.

        Raises UserError where the model gives no number.
        """
        self.stand(context)
        times, last = [], time.perf_counter()
        coming = Arriving(self._start(batch, context))
        for i in range(count):
            this = coming
            if i + 1 < count:
                coming = Arriving(self.decoder.again()[0])
            require_finite(this.lists()[0])
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        return Timing(tuple(times))

    def _start(self, batch: int, context: int) -> Tensor:
        return self.decoder.step(self._ids[:batch], [context + 1] * batch)[0]

    def both(self, batch: int, context: int, count: int) -> tuple[Timing, Timing]:
        """:meth:`queued` and :meth:`answered`, after steps to warm up.

        All of them together end within a text of ``context`` tokens, so that a cache that grows has no larger room than
        such a text needs.
        """
        begin = max(0, context - max(WARM_UP, count))
        self.queued(batch, begin, min(WARM_UP, context))
        count = min(count, context)
        return self.queued(batch, begin, count), self.answered(batch, begin, count)
