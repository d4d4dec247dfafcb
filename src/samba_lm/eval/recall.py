"""What a model finds again in a long text: it reads texts with one thing in them, and is asked for that thing.

Texts are read through the inference engine, in pieces, so a text of any length takes the same memory (but with full
attention). Answers are greedy.
"""

from __future__ import annotations

import abc
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from samba_lm.data.recall import Example
from samba_lm.engine.engine import Engine
from samba_lm.engine.request import Completion, Event, Progress, Request
from samba_lm.errors import UserError
from samba_lm.eval.intervals import wilson
from samba_lm.eval.perplexity import attention_memory
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import Reader
from samba_lm.memory import free_memory, ran_out
from samba_lm.model import SambaLM
from samba_lm.state import State
from samba_lm.tokenizer import Tokenizer

Key = tuple[int, float | None]
"""A cell: its size, and the depth where there is one."""
OnProgress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""

SLOTS = 16
"""Texts asked about at once."""
TOKENS_AT_ONCE = 1 << 17
"""Tokens that full attention holds at once, over all texts."""
SPARE_TOKENS = 8
"""Tokens that an answer may have beyond the right one's: enough to see that it goes on."""
TEXT_BYTES = 24
"""Bytes that a token of a text takes while the text is made: int64, in pieces, together, and as it is read."""
GPU_CHUNK = 8192
"""Tokens read at once on a GPU."""


@dataclass(frozen=True)
class Plan:
    """Which texts: ``trials`` in each cell, of each size and at each depth.

    Attributes:
        sizes: of the texts, in the task's unit.
        depths: where the answer stands, 0 to 1; (None,) where that is left to chance.
        seed: of what is drawn; None: the operating system's randomness.
        control: ask the same question once more of a state that was set to zero just before it. (Nothing but the
            question can be known then, so an answer that is right all the same would mean that something leaks.)
    """

    sizes: tuple[int, ...]
    depths: tuple[float | None, ...]
    trials: int
    seed: int | None = None
    control: bool = False

    def __post_init__(self) -> None:
        if not self.sizes or not self.depths:
            raise UserError("There are no sizes or no depths: give at least one of each.")
        if self.trials < 1:
            raise UserError(f"There are {self.trials} texts in each cell: give at least 1.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: it must be from 0 to {2**32 - 1}.")
        bad = next((depth for depth in self.depths if depth is not None and not 0 <= depth <= 1), None)
        if bad is not None:
            raise UserError(f"depth is {bad}: it must be from 0 (at the beginning) to 1 (just before the question).")

    @property
    def cells(self) -> list[Key]:
        return [(size, depth) for size in self.sizes for depth in self.depths]

    def random(self, cell: Key, trial: int) -> np.random.RandomState:
        """What a text is drawn from."""
        if self.seed is None:
            return np.random.RandomState(np.frombuffer(secrets.token_bytes(16), dtype=np.uint32))
        size, depth = cell
        return np.random.RandomState([self.seed, size, round(1e6 * (depth or 0)), trial])


class Task(abc.ABC):
    """The texts of a plan, for a tokenizer, and how answers to them are read.

    Attributes:
        name: of the task.
        unit: what sizes count.
        facts: plain data that decides the texts besides the plan.
    """

    name: str
    unit: str
    facts: dict[str, object]
    plan: Plan

    @abc.abstractmethod
    def example(self, cell: Key, trial: int) -> Example:
        """A text of a cell. Raises UserError for a size that is too small."""

    @abc.abstractmethod
    def tokens(self, cell: Key) -> int:
        """Tokens of a cell's texts, about; told without making one."""

    @abc.abstractmethod
    def read_off(self, written: str) -> str:
        """The answer in what a model wrote, up to a line break."""

    def settings(self) -> dict[str, object]:
        """All that decides a cell's result but its size, its depth and the model."""
        plan = self.plan
        seed = "operating system's randomness" if plan.seed is None else plan.seed
        return {"task": self.name, "trials": plan.trials, "seed": seed, "control": plan.control, **self.facts}


@dataclass(frozen=True)
class Trial:
    """One text and what came of it.

    Attributes:
        answer: the right one.
        written: what the model wrote, up to a line break.
        right: whether the answer was read off that: of a passkey, its first run of digits; of a phonebook, all of it.
        exact: whether its first tokens were the right answer's too.
        tokens: of the text and the question.
        control: what was written with the state set to zero; None: not asked.
        control_right: whether that was right; None: not asked.
    """

    answer: str
    written: str
    right: bool
    exact: bool
    tokens: int
    control: str | None = None
    control_right: bool | None = None


@dataclass(frozen=True)
class Cell:
    """The trials of one size and depth, or why there are none."""

    size: int
    depth: float | None
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0
    skipped: str = ""

    @property
    def key(self) -> Key:
        return self.size, self.depth


@dataclass(frozen=True)
class Count:
    """The trials of one cell or of several, counted; ``control_right`` is None where no control was asked."""

    total: int
    right: int
    exact: int
    control_right: int | None

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Count:
        trials = [trial for cell in cells for trial in cell.trials]
        controls = [bool(trial.control_right) for trial in trials if trial.control is not None]
        return cls(
            len(trials),
            sum(trial.right for trial in trials),
            sum(trial.exact for trial in trials),
            sum(controls) if controls else None,
        )

    @property
    def accuracy(self) -> float:
        """Share that was right; NaN without trials."""
        return self.right / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return wilson(self.right, self.total)


def measure(
    model: SambaLM,
    tokenizer: Tokenizer,
    task: Task,
    *,
    without: frozenset[Key] = frozenset(),
    progress: OnProgress | None = None,
) -> Iterator[Cell]:
    """Yield the task's cells, but those of ``without``, as they are finished.

    A cell that full attention cannot hold is skipped, and says so. Close the iterator to end early.
    """
    cells = [cell for cell in task.plan.cells if cell not in without]
    whole = sum(size for size, _ in cells)
    done = 0
    chunk = GPU_CHUNK if model.device.type == "cuda" else DEFAULT_CHUNK
    with Engine(model, tokenizer, slots=SLOTS, chunk=chunk) as engine:
        for cell in cells:

            def tell(share: float, done: int = done, size: int = cell[0]) -> None:
                if progress is not None:
                    progress((done + share * size) / whole)

            yield _cell(engine, task, cell, tell)
            done += cell[0]
            tell(1.0)


def _cell(engine: Engine, task: Task, cell: Key, tell: OnProgress) -> Cell:
    began = time.perf_counter()
    if why := _too_much(engine, task, cell):
        return Cell(*cell, skipped=why)
    try:
        examples = [task.example(cell, trial) for trial in range(task.plan.trials)]
    except MemoryError:
        return Cell(*cell, skipped="out of memory for the texts")
    longest, most = max(map(len, examples)), engine.model.config.max_context
    if not engine.constant and longest + SPARE_TOKENS > most:
        return Cell(*cell, skipped=_beyond(longest, most))
    at_once = SLOTS if engine.constant else max(1, min(SLOTS, TOKENS_AT_ONCE // longest))
    free = free_memory() if engine.model.device.type == "cpu" else None  # a GPU says itself when there is no more
    if not engine.constant and free is not None:
        needed = attention_memory(engine.model, longest)
        if needed > free:
            room = f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            return Cell(*cell, skipped=f"full attention would take about {room}")
        at_once = min(at_once, int(free // needed))
    trials: list[Trial] = []
    try:
        for first in range(0, len(examples), at_once):
            some = examples[first : first + at_once]

            def read(share: float, first: int = first, count: int = len(some)) -> None:
                tell((first + share * count) / len(examples))

            trials += _ask(engine, task, some, read)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return Cell(*cell, skipped=f"out of memory with {longest:,} tokens")
    return Cell(*cell, tuple(trials), time.perf_counter() - began)


def _too_much(engine: Engine, task: Task, cell: Key) -> str:
    """Why a cell is not even begun with: its texts take more than there is room for; "" where they do not."""
    tokens, most, free = task.tokens(cell), engine.model.config.max_context, free_memory()
    if not engine.constant and tokens > 2 * most:
        return _beyond(tokens, most)
    needed = tokens * task.plan.trials * TEXT_BYTES
    if free is None or needed <= free:
        return ""
    return f"the texts would take about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _beyond(tokens: int, most: int) -> str:
    spare = f"and {SPARE_TOKENS} to spare"
    return f"full attention would have to hold {tokens:,} tokens {spare}, max_context is {most:,}"


def _ask(engine: Engine, task: Task, examples: Sequence[Example], read: OnProgress) -> list[Trial]:
    """Read the documents, then ask each its question, and the control's."""
    nothing = SamplingParams(max_tokens=0, temperature=0.0)
    seen = [0] * len(examples)

    def note(i: int, event: Event) -> None:
        if isinstance(event, Progress):
            seen[i] = event.read
            read(sum(seen) / sum(e.document.size for e in examples))

    ends = engine.complete([Request([e.document], nothing, keep=True) for e in examples], note)
    readers = [end.end.reader for end in ends]
    answers = engine.complete([_question(e, r) for e, r in zip(examples, readers, strict=True)])
    trials = [_trial(task, e, answer) for e, answer in zip(examples, answers, strict=True)]
    if not task.plan.control:
        return trials
    emptied = [_emptied(reader) for reader in readers]
    controls = engine.complete([_question(e, r) for e, r in zip(examples, emptied, strict=True)])
    written = [control.text for control in controls]
    return [
        replace(trial, control=text, control_right=task.read_off(text) == trial.answer)
        for trial, text in zip(trials, written, strict=True)
    ]


def _question(example: Example, reader: Reader | None) -> Request:
    assert reader is not None, "it was asked for"
    most = example.answer.size + example.end.size + SPARE_TOKENS
    params = SamplingParams(temperature=0.0, max_tokens=most, stop=("\n",))
    return Request([example.question], params, context=reader)


def _emptied(reader: Reader | None) -> Reader:
    """The same place in the text, with nothing remembered of it."""
    assert reader is not None
    layers = [{name: torch.zeros_like(t) for name, t in layer.items()} for layer in reader.state.layers]
    logits = None if reader.logits is None else torch.zeros_like(reader.logits)
    return Reader(State(reader.state.cursor, layers), list(reader.lengths), logits)


def _trial(task: Task, example: Example, answer: Completion) -> Trial:
    tokens = [token.id for token in answer.tokens][: example.answer.size]
    return Trial(
        answer=example.text,
        written=answer.text,
        right=task.read_off(answer.text) == example.text,
        exact=tokens == example.answer.tolist(),
        tokens=example.prompt_tokens,
    )
