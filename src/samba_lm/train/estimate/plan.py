"""The estimate of a recipe on some GPUs, and what would fit them best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from samba_lm.config import ModelConfig
from samba_lm.train.estimate.gpus import Gpu
from samba_lm.train.estimate.layout import Layout, check, suggested
from samba_lm.train.estimate.memory import Memory, memory
from samba_lm.train.estimate.speed import Speed, speed
from samba_lm.train.recipe import TrainSection

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = ("none", "selective", "full")
ENOUGH = 8192
"""Tokens of a micro-batch on one GPU from which on more of them are hardly faster."""


@dataclass(frozen=True)
class Choice:
    """The most rows at once that fit with one kind of activation checkpointing."""

    activation_checkpointing: Mode
    micro_batch: int | None
    """None: not even one row fits."""
    memory: Memory
    """With that many rows, or with one."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes as its recipe says, and what to set instead."""

    gpu: Gpu
    layout: Layout
    micro_batch: int
    memory: Memory
    speed: Speed
    tokens: int
    choices: tuple[Choice, ...]
    """In the order of MODES, for this layout."""
    advised: tuple[Layout, Choice] | None
    """What to set; None: nothing tried fits these GPUs."""

    @property
    def fits(self) -> bool:
        """Whether the recipe as it is fits the GPU."""
        return self.memory.total <= self.gpu.usable

    @property
    def seconds(self) -> float:
        """Of training alone: no validation, no checkpoints."""
        return self.tokens / self.speed.all

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.seconds * self.layout.gpus / 3600

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        advised = None
        if self.advised is not None:
            layout, choice = self.advised
            advised = {"layout": asdict(layout), **_choice(choice)}
        return {
            "gpu": {**asdict(self.gpu), "usable": self.gpu.usable},
            "layout": {**asdict(self.layout), "gpus": self.layout.gpus},
            "micro_batch": self.micro_batch,
            "memory": {**self.memory.record(), "total": self.memory.total},
            "fits": self.fits,
            "speed": asdict(self.speed),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "choices": [_choice(choice) for choice in self.choices],
            "advised": advised,
        }


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "activation_checkpointing": choice.activation_checkpointing,
        "micro_batch": choice.micro_batch,
        "memory": choice.memory.total,
    }


def estimate(
    config: ModelConfig,
    train: TrainSection,
    layout: Layout,
    gpu: Gpu,
    *,
    tokens_per_s: float | None = None,
    efficiency: float | None = None,
) -> Estimate:
    """Estimate training ``config`` as ``train`` says on ``layout``'s GPUs.

    Raises UserError where the batch does not divide among them, or the recipe does not say how long to train.
    """
    check(train, layout)
    micro = min(train.micro_batch_size, train.batch_size // layout.readers)
    return Estimate(
        gpu=gpu,
        layout=layout,
        micro_batch=micro,
        memory=memory(config, train, layout, micro),
        speed=speed(config, train, layout, gpu, given=tokens_per_s, efficiency=efficiency),
        tokens=train.total_steps * train.tokens_per_step,
        choices=choices(config, train, layout, gpu),
        advised=advise(config, train, layout, gpu),
    )


def choices(config: ModelConfig, train: TrainSection, layout: Layout, gpu: Gpu) -> tuple[Choice, ...]:
    """For each kind of activation checkpointing the most rows at once that fit."""
    rows = train.batch_size // layout.readers
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
    found = []
    for mode in MODES:
        settings = train.model_copy(update={"activation_checkpointing": mode})
        each = ((n, memory(config, settings, layout, n)) for n in sizes)
        fitting = next((pair for pair in each if pair[1].total <= gpu.usable), None)
        micro, held = fitting or (None, memory(config, settings, layout, 1))
        found.append(Choice(mode, micro, held))
    return tuple(found)


def advise(config: ModelConfig, train: TrainSection, layout: Layout, gpu: Gpu) -> tuple[Layout, Choice] | None:
    """A layout of as many GPUs, and what to make again there so that micro-batches are large enough; None: none fits.

    Making nothing again is fastest, if the micro-batches are no smaller than ENOUGH tokens; else as little as gives
    such. What the recipe says of replicate and context is kept where it fits, and rows are shared out among more only
    where one does not fit.
    """
    for tried in _layouts(layout, train.length):
        if train.batch_size % tried.readers:
            continue
        fitting = [choice for choice in choices(config, train, tried, gpu) if choice.micro_batch is not None]
        rows = train.batch_size // tried.readers
        wanted = min(rows, -(-ENOUGH * tried.context // train.length))
        for choice in fitting:
            if choice.micro_batch is not None and choice.micro_batch >= wanted:
                return tried, choice
        if fitting:
            return tried, fitting[-1]
    return None


def _layouts(layout: Layout, length: int) -> Iterator[Layout]:
    """Those to try in turn."""
    if layout.replicate > 1 or layout.context > 1:
        yield layout
    for context in (1, 2, 4, 8, 16, 32, 64):
        if context >= layout.context and layout.gpus % context == 0 and length % context == 0:
            yield from suggested(layout.gpus, context)
