"""``samba-lm bench paper``: the paper's two figures of speed, reading prompts and generating, for its five models.

Every model is ours: built from the zoo with random bf16 weights, read and stepped by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samba_lm import zoo
from samba_lm.bench import decode, prefill
from samba_lm.bench.gpu import NotMeasured, attempt, release, synchronize
from samba_lm.bench.steps import WARM_UP, Steps
from samba_lm.bench.training import new_model
from samba_lm.checkpoint import place
from samba_lm.errors import UserError
from samba_lm.generation.params import SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.generation.prefill import prefill as read_prompts
from samba_lm.model import SambaLM

SAMBA, LLAMA = "samba-1.7b", "llama3-1.6b"
MODELS = (SAMBA, LLAMA, "mistral-1.6b", "mamba-1.8b", "self-extend-llama3-1.6b")
"""The most important ones first, in case the time is up."""
SHORTEST = 1024
LEAST_AT_ONCE = 8192
UP = "skipped: the time was up"


@dataclass(frozen=True)
class Plan:
    """What is measured. Raises UserError for numbers that are no powers of two from 1,024 on."""

    tokens: int = 131_072
    """Of all prompts together: their number is this by their length, 1K, 2K .. all."""
    generated: int = 65_536
    """Tokens of the longest text; steps are timed at 1K, 2K .. so many."""
    batch: int = 16
    """Texts generated at once."""
    repeats: int = 3
    """Readings of each length."""
    steps: int = 16
    """Steps timed at each length of text."""
    at_once: tuple[int, ...] = (131_072,)
    """Tokens of prompts that a model is given at once, several ways to try: the fastest is taken for each length, for
    each model. Where memory does not allow it, half as many."""

    def __post_init__(self) -> None:
        for name in ("tokens", "generated"):
            value = getattr(self, name)
            if value < SHORTEST or value & (value - 1):
                raise UserError(f"{name}={value} must be a power of two, {SHORTEST} or more.")

    @property
    def lengths(self) -> list[int]:
        return doublings(self.tokens)

    @property
    def contexts(self) -> list[int]:
        return doublings(self.generated)


def doublings(largest: int) -> list[int]:
    """1,024, 2,048 .. ``largest``."""
    return [SHORTEST << i for i in range((largest // SHORTEST).bit_length())]


@dataclass
class Curves:
    """What was measured of one model; times in ms."""

    name: str
    prompts: dict[int, list[float]] = field(default_factory=dict)
    """Of reading all prompts, by their length."""
    at_once: dict[int, int] = field(default_factory=dict)
    """Tokens read at once, by the prompts' length."""
    steps: dict[int, float] = field(default_factory=dict)
    """From token to token in Python, by the length of the texts."""
    gpu_steps: dict[int, float] = field(default_factory=dict)
    """The GPU's part of that."""
    plain: str = ""
    """Why steps were ``model.step``'s and not those of the kernels for steps; "" if they were the kernels'."""
    parity: dict[str, list[float | None]] = field(default_factory=dict)
    """Relative errors of a narrow twin, and those of plain bf16 on the CPU, of reading and of steps."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why something is missing: by "prompts 1024", "steps 1024", or "all"."""

    def record(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Curves:
        """Raises KeyError, TypeError, ValueError or AttributeError for what :meth:`record` did not give."""
        kept: dict[str, Any] = {f.name: record[f.name] for f in fields(cls)}
        for name in ("prompts", "at_once", "steps", "gpu_steps"):
            kept[name] = {int(key): value for key, value in kept[name].items()}
        return cls(**kept)

    @property
    def whole(self) -> bool:
        """Nothing is missing."""
        return not self.notes


def measure(
    name: str, plan: Plan, device: torch.device, until: float, report: Callable[[str], None] = lambda what: None
) -> Curves:
    """Everything of one model, which is freed afterwards; what fails is a note, and so is what would not end before
    ``until`` (of time.perf_counter)."""
    curves = Curves(name)
    config = zoo.get(name)
    try:
        report(f"{name}: parity")
        for what, check in (("reading", prefill.check), ("steps", decode.check)):
            curves.parity[what] = [figure.value for figure in attempt(lambda check=check: check(config, device))]  # type: ignore[misc]
        model = attempt(lambda: place(new_model(config, device), device, torch.bfloat16).eval())
    except NotMeasured as failure:
        curves.notes["all"] = str(failure)
        return curves
    _measure_steps(model, plan, curves, until, report)
    release(device)
    _measure_prompts(model, plan, curves, until, report)
    del model
    release(device)
    return curves


def _measure_prompts(model: SambaLM, plan: Plan, curves: Curves, until: float, report: Callable[[str], None]) -> None:
    """By rising length: all take about as long, but with full attention, where the next takes up to twice as long."""
    last = 0.0
    for length in plan.lengths:
        if time.perf_counter() + 2 * last > until:
            curves.notes[f"prompts {length}"] = UP
            continue
        report(f"{curves.name}: prompts of {length:,}")
        began = time.perf_counter()
        try:
            curves.prompts[length], curves.at_once[length] = attempt(
                lambda length=length: time_prompts(model, plan, length)  # type: ignore[misc]
            )
        except NotMeasured as failure:
            curves.notes[f"prompts {length}"] = str(failure)
        release(model.device)
        last = time.perf_counter() - began


def time_prompts(model: SambaLM, plan: Plan, length: int) -> tuple[list[float], int]:
    """Times of reading all prompts of one length in the fastest way, in ms, and how many tokens are read at once in it.

    Each way is tried once, which also warms up; then the fastest is timed. One way alone is tried on the shortest
    length only.
    """
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (plan.tokens // length, length))
    ways = sorted({min(size, plan.tokens) for size in plan.at_once}, reverse=True)
    tried: dict[int, float] = {}
    if len(ways) > 1 or length == SHORTEST:
        for size in ways:
            tried.update(_tried(model, ids, size))
        best = min(tried, key=lambda size: tried[size])
    else:
        best = ways[0]
    times: list[float] = []
    while len(times) < plan.repeats:
        found = _tried(model, ids, best)
        (best,), times = found, [*times, *found.values()]
    return times, best


def _tried(model: SambaLM, ids: np.ndarray, at_once: int) -> dict[int, float]:
    """ms by how many tokens were read at once: ``at_once``, or the most that there is memory for."""
    while True:
        try:
            synchronize(model.device)
            began = time.perf_counter()
            read(model, ids, at_once)
            synchronize(model.device)
            return {at_once: 1e3 * (time.perf_counter() - began)}
        except torch.OutOfMemoryError:
            if at_once <= LEAST_AT_ONCE:
                raise
        release(model.device)
        at_once //= 2


def read(model: SambaLM, ids: np.ndarray, at_once: int) -> Tensor:
    """Logits [B, V] after the last token of each prompt, int64 [B, L]: as many prompts side by side as have at most
    ``at_once`` tokens, a longer prompt in pieces of so many."""
    rows, length = ids.shape
    group = max(1, min(rows, at_once // length))
    found = []
    with torch.inference_mode():
        for begin in range(0, rows, group):
            some = ids[begin : begin + group]
            reader = Reader.create(model, SamplingParams(), batch=len(some))
            read_prompts(model, [[row] for row in some], reader, len(some) * min(length, at_once))
            assert reader.logits is not None
            found.append(reader.logits)
    return torch.cat(found)


def _measure_steps(model: SambaLM, plan: Plan, curves: Curves, until: float, report: Callable[[str], None]) -> None:
    texts = Steps(model, plan.batch)
    curves.plain = texts.plain
    for context in plan.contexts:
        report(f"{curves.name}: steps at {context:,}")
        if time.perf_counter() > until:
            curves.notes[f"steps {context}"] = UP
            continue
        try:
            attempt(lambda context=context: texts.fill(context))  # type: ignore[misc]
            queued, answered = attempt(lambda context=context: texts.both(plan.batch, context, plan.steps))  # type: ignore[misc]
        except NotMeasured as failure:
            curves.notes[f"steps {context}"] = str(failure)
            continue
        curves.steps[context], curves.gpu_steps[context] = answered.median, queued.median


def generate(
    name: str, plan: Plan, device: torch.device, report: Callable[[str], None] = lambda what: None
) -> dict[int, float]:
    """Seconds until each of the plan's lengths is reached by texts that are generated from their first token on."""
    report(f"{name}: generating {plan.batch} x {plan.generated:,} tokens")
    texts = Steps(place(new_model(zoo.get(name), device), device, torch.bfloat16).eval(), plan.batch)
    texts.queued(plan.batch, 0, WARM_UP)
    texts.clear()
    times = np.cumsum(texts.answered(plan.batch, 0, plan.generated).times) / 1e3
    return {context: float(times[context - 1]) for context in plan.contexts}
