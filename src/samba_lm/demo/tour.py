"""A minute with a trained model: it writes, it finds a number again in a long document, it reads better for longer."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from samba_lm.data.passkey import QUESTION
from samba_lm.data.recall import Example
from samba_lm.demo.corpus import read_texts
from samba_lm.demo.story import Story
from samba_lm.errors import UserError
from samba_lm.eval.passkey import PasskeyTask
from samba_lm.eval.perplexity import LengthResult, perplexity
from samba_lm.eval.recall import Cell, Key, Plan, Trial, measure
from samba_lm.generation.api import stream
from samba_lm.memory import resident_memory
from samba_lm.model import SambaLM
from samba_lm.tokenizer import Tokenizer

PROMPT = "Once upon a time, in a little house by the sea, there lived"
WRITTEN = 200
"""Tokens of the story."""
LONGEST, SHORTEST = 1 << 18, 1 << 10
"""Tokens of the document that the number is hidden in: as many as there is time for, a power of two between these."""
SHARES = {"write": 0.07, "recall": 0.7, "curve": 0.23}
"""Of the time there is, at most; the rest is for looking how fast the machine is, and for the page."""
MARGIN = 0.9
"""Machines slow down when they get warm: plan for this much of the speed that was seen."""
THREADS = torch.get_num_threads()
"""As many as PyTorch chose for this machine, or was told to take."""
PROBE = 2048
"""Tokens read to see how fast the machine is."""
CONTEXTS = ((1 << 14, 2), (1 << 14, 4), (1 << 12, 2), (1 << 12, 4), (1 << 10, 4), (1 << 9, 2))
"""The longest context of the curve and the factor between two; the first for which there is time and text is taken."""
SHORTEST_CONTEXT = 256
BEGINNING = 20_000
"""Characters that have more tokens than that."""


@dataclass(frozen=True)
class TourSettings:
    """The folder for the page, the user's texts (none: what is at hand), seconds in all, the story's seed."""

    out: Path
    texts: Sequence[Path]
    seconds: float
    seed: int = 0


@dataclass
class Reading:
    """A document as it was read: at each note the tokens so far, the seconds they took and the memory held."""

    length: int
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    """Bytes of this process in memory."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens[-1] / self.seconds[-1] if self.seconds and self.seconds[-1] else 0.0


@dataclass
class TourResult:
    """Everything the page tells."""

    model: str
    parameters: int
    state_bytes: int
    constant_state: bool
    threads: int
    """While it reads; it writes with one or as many, whichever is faster."""
    speed: float
    """Tokens a second that the probe was read with."""
    reading: Reading
    depth: float
    filler: str
    source: str
    prompt: str = PROMPT
    written: str = ""
    new_tokens: int = 0
    decode_tokens_per_s: float = 0.0
    cell: Cell | None = None
    results: list[LengthResult] = field(default_factory=list)
    seconds: float = 0.0
    planned: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def trial(self) -> Trial | None:
        """What came of the question; None where the document could not be read."""
        return self.cell.trials[0] if self.cell is not None and self.cell.trials else None


class _Hidden(PasskeyTask):
    """One text, drawn once, so that what is hidden in it can be told before it is read."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, filler: str | None) -> None:
        self._drawn: dict[tuple[Key, int], Example] = {}
        super().__init__(plan, tokenizer, filler)

    def example(self, cell: Key, trial: int) -> Example:
        if (cell, trial) not in self._drawn:
            self._drawn[cell, trial] = super().example(cell, trial)
        return self._drawn[cell, trial]


def run(
    settings: TourSettings,
    name: str,
    model: SambaLM,
    tokenizer: Tokenizer,
    console: Console,
    story: Story | None = None,
) -> TourResult:
    """The whole tour with a model of this name; the page is the caller's.

    ``story``: one that began earlier, where loading the model is to count; None: it begins now. Raises UserError for
    texts that cannot be read or hold no words.
    """
    story = story or Story(console, stages=5)
    text, source = read_texts(settings.texts)
    size = tokenizer.encode(text[:BEGINNING]).size
    if size < SHORTEST_CONTEXT:
        raise UserError(
            f"{source} has {size} tokens, and the demo needs {SHORTEST_CONTEXT} at least: give longer texts."
        )
    done = story.stage("speed", "How fast this machine reads")
    threads, speed = _reading_speed(model)
    length = document_length(speed, SHARES["recall"] * settings.seconds)
    result = TourResult(
        model=name,
        parameters=model.config.parameters(),
        state_bytes=model.config.state_bytes(length, model.dtype.itemsize),
        constant_state=model.config.constant_state,
        threads=threads,
        speed=speed,
        reading=Reading(length),
        depth=(1 + secrets.randbelow(98)) / 100,
        filler=source if settings.texts else "sentences that say nothing",
        source=source,
        planned=settings.seconds,
    )
    story.say(f"about {speed:,.0f} tokens a second with {threads} thread{'s' * (threads != 1)}")
    if length < LONGEST:
        story.say(
            f"so the document has {length:,} tokens instead of {LONGEST:,}, to be done in {settings.seconds:.0f} s "
            "(--seconds gives it more)"
        )
    done()

    done = story.stage("write", f"Writing: {escape(name)} goes on from the beginning of a story")
    _write(story, result, model, tokenizer, settings)
    done()

    done = story.stage("recall", f"Recall: a number hidden in {length:,} tokens of {escape(result.filler)}")
    _recall(story, result, model, tokenizer, text if settings.texts else None)
    done()

    done = story.stage("curve", f"Perplexity against context, on {escape(source)}")
    left = 0.95 * settings.seconds - story.elapsed
    _curve(story, result, model, tokenizer, text, min(left, SHARES["curve"] * settings.seconds))
    done()
    result.stages = story.times
    return result


def document_length(speed: float, seconds: float) -> int:
    """The power of two of tokens that is read in this time, from :data:`SHORTEST` to :data:`LONGEST`."""
    most = max(1.0, MARGIN * speed * seconds)
    return min(LONGEST, max(SHORTEST, 1 << int(math.log2(most))))


def _reading_speed(model: SambaLM) -> tuple[int, float]:
    """The best number of threads to read with, and the tokens a second."""
    size = PROBE if model.config.constant_state else min(PROBE, model.config.max_context)
    ids = torch.arange(size)[None].to(model.device) % model.config.vocab_size
    threads, seconds = _fastest(lambda: model.features(ids))
    return threads, size / seconds


def _fastest(work: Callable[[], object]) -> tuple[int, float]:
    """Whether all threads are faster or one, and the seconds that some work takes then. It stays at that number.

    On cores that are busy, threads wait for each other far longer than they work.
    """
    taken = {}
    for threads in sorted({THREADS, 1}, reverse=True):
        torch.set_num_threads(threads)
        times = []
        with torch.inference_mode():
            for _ in range(4):  # the first warms up
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
        taken[threads] = sorted(times[1:])[1]
    threads = min(taken, key=lambda each: taken[each])
    torch.set_num_threads(threads)
    return threads, taken[threads]


def _write(story: Story, result: TourResult, model: SambaLM, tokenizer: Tokenizer, settings: TourSettings) -> None:
    state, ids = model.init_state(1), torch.zeros(1, dtype=torch.int64, device=model.device)
    _fastest(lambda: [model.step(ids, state) for _ in range(5)])
    until = story.elapsed + SHARES["write"] * settings.seconds
    text = stream(model, tokenizer, PROMPT, max_tokens=WRITTEN, temperature=0.8, top_p=0.95, seed=settings.seed)
    story.console.print()
    story.console.out(PROMPT, end="", style="dim", highlight=False)
    pieces = []
    for piece in text:
        pieces.append(piece)
        story.console.out(piece, end="", highlight=False)
        if story.elapsed > until:
            text.close()
            break
    story.console.print("\n")
    torch.set_num_threads(result.threads)
    result.written, result.new_tokens = "".join(pieces), text.timing.new_tokens
    result.decode_tokens_per_s = text.timing.decode_tokens_per_second
    size = f"in a state of {result.state_bytes / 1e6:.2f} MB, however long it goes on"
    story.say(
        f"{result.new_tokens} tokens at {result.decode_tokens_per_s:.0f} a second"
        + (f", {size}" if result.constant_state else "")
    )


def _recall(story: Story, result: TourResult, model: SambaLM, tokenizer: Tokenizer, filler: str | None) -> None:
    reading, cell = result.reading, (result.reading.length, result.depth)
    plan = Plan((reading.length,), (result.depth,), trials=1, control=True)
    task = _Hidden(plan, tokenizer, filler)
    key = task.example(cell, 0).text
    story.say(
        f"The pass key is [bold]{key}[/bold]: drawn just now, it stands once, after {result.depth:.0%} of the text"
    )
    began = time.perf_counter()

    def note(share: float) -> None:
        reading.tokens.append(round(share * reading.length))
        reading.seconds.append(time.perf_counter() - began)
        reading.resident.append(resident_memory())
        tell()

    with _shown(story, reading) as tell:
        (result.cell,) = measure(model, tokenizer, task, progress=note)
    trial = result.trial
    if trial is None:
        story.say(f"not read: {result.cell.skipped}")
        return
    story.say(
        f"read in {reading.seconds[-1]:.1f} s, {reading.tokens_per_s:,.0f} tokens a second, in "
        f"{_mib(min(reading.resident))} to {_mib(max(reading.resident))} MiB of memory from beginning to end"
    )
    found = "[green]right[/green]" if trial.right else "[red]wrong[/red]"
    story.say(f"{QUESTION} ... [bold]{escape(shown(trial.written))}[/bold]  {found}")
    found = "[red]still right, so something leaks[/red]" if trial.control_right else "wrong, as it should be"
    story.say(f"the same with its memory emptied: {escape(shown(trial.control or ''))}  {found}")


def shown(answer: str) -> str:
    """An answer in one short line."""
    answer = " ".join(answer.split())
    return f"{answer[:24]}..." if len(answer) > 27 else answer or "(nothing)"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


@contextmanager
def _shown(story: Story, reading: Reading) -> Iterator[Callable[[], None]]:
    """Yield a function that shows how far a document was read: a bar on a terminal, elsewhere a line each quarter."""
    if story.console.is_terminal:
        columns = (TextColumn("   "), BarColumn(bar_width=None), TextColumn("{task.description}"))
        with Progress(*columns, console=story.console, expand=True) as progress:
            bar = progress.add_task("", total=reading.length)

            def draw() -> None:
                progress.update(bar, completed=reading.tokens[-1], description=_state(reading))

            yield draw
        return
    quarters = 0

    def tell() -> None:
        nonlocal quarters
        if 4 * reading.tokens[-1] >= (quarters + 1) * reading.length:
            quarters = 4 * reading.tokens[-1] // reading.length
            story.say(_state(reading))

    yield tell


def _state(reading: Reading) -> str:
    return f"{reading.tokens[-1]:,} tokens  {reading.tokens_per_s:,.0f}/s  {_mib(reading.resident[-1])} MiB"


def contexts(speed: float, seconds: float, tokens: int) -> tuple[list[int], int]:
    """The context lengths for which there is time and text, and how many tokens are measured at each of them.

    Every length reads the same text, so that is the longest length or some times that.
    """
    most = MARGIN * speed * max(0.0, seconds)
    for longest, factor in CONTEXTS:
        steps = round(math.log(longest / SHORTEST_CONTEXT, factor))
        lengths = [longest // factor**i for i in range(steps, -1, -1)]
        windows = min(int(most / len(lengths)), tokens) // longest
        if windows:
            break
    return [length for length in lengths if length <= tokens], max(1, windows) * longest


def _curve(story: Story, result: TourResult, model: SambaLM, tokenizer: Tokenizer, text: str, seconds: float) -> None:
    speed = result.reading.tokens_per_s or result.speed
    # As much text as could be read in this time: no more of a library need be encoded.
    ids = tokenizer.encode(text[: 8 * max(CONTEXTS[0][0], int(speed * max(1.0, seconds)))]).astype(np.int64)
    lengths, count = contexts(speed, seconds, ids.size)
    columns = (TextColumn("   "), BarColumn(bar_width=None))
    hidden = not story.console.is_terminal
    with Progress(*columns, console=story.console, transient=True, expand=True, disable=hidden) as progress:
        bar = progress.add_task("", total=None)
        found = perplexity(
            model,
            ids[:count],
            lengths,
            tokenizer=tokenizer,
            max_tokens=count,
            progress=lambda done, whole: progress.update(bar, completed=done, total=whole),
        )
    result.results = [r for r in found if math.isfinite(r.perplexity)]
    for r in found:
        if r.note:
            story.say(f"not measured: {escape(r.note)}")
    if not result.results:
        return
    highest = max(r.perplexity for r in result.results)
    for r in result.results:
        width = round(24 * r.perplexity / highest)
        story.say(f"{r.length:>7,} tokens  {r.perplexity:8.2f}  [cyan]{'█' * width}[/cyan]")
    story.say(verdict(result))


def verdict(result: TourResult) -> str:
    """What the curve says, whichever way it turned out."""
    if not result.results:
        return "nothing was measured"
    first, last = result.results[0], result.results[-1]
    if last.length == first.length:
        return "one length only: there was no time or no text for more"
    change = last.perplexity / first.perplexity - 1
    found = "more context helps" if change < -0.01 else "more context hurts" if change > 0.01 else "no difference"
    return (
        f"from {first.length:,} to {last.length:,} tokens of context perplexity changes by {100 * change:+.1f}%: "
        f"{found} (the same {result.results[-1].windows * last.length:,} tokens at every length)"
    )
