"""The demo's story: text, four twins on the same batches, perplexity past the trained length, generation, a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from samba_lm import checkpoint
from samba_lm.data.loader import Loader
from samba_lm.data.prepare import prepare
from samba_lm.data.shards import TokenDataset
from samba_lm.demo.corpus import gather
from samba_lm.demo.folder import TWINS
from samba_lm.demo.story import Story
from samba_lm.errors import UserError
from samba_lm.eval.perplexity import LengthResult, perplexity
from samba_lm.generation.api import stream
from samba_lm.model import SambaLM
from samba_lm.tokenizer import ByteTokenizer, Tokenizer
from samba_lm.train.loop import fit
from samba_lm.train.observer import Observer, Observers, StepRecord
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.progress import progress_observer
from samba_lm.train.recipe import TrainSection
from samba_lm.train.step import train_step

LENGTH = 256
"""Tokens of a training sequence; every twin with a window has half of it."""
BATCH = 8
LEARNING_RATE = 3e-3
MULTIPLES = (1, 2, 4, 8, 16)
"""Of the training length: the context lengths at which perplexity is measured."""
SHARES = {"training": 0.76, "evaluation": 0.16}
"""Of the time there is; the rest is for preparing, calibrating, generating and the report."""
MARGIN = 0.92
"""Machines slow down when they get warm: plan for this much of the calibrated speed."""
PATIENCE = 1.25
"""A model that takes this many times its planned time is stopped, and those after it at the same step."""
FEW_STEPS = 150
"""Below this the models have hardly learned to use their context."""


@dataclass(frozen=True)
class DemoSettings:
    """The folder for everything, the user's texts (none: the standard library), seconds in all, the seed."""

    out: Path
    texts: Sequence[Path]
    seconds: float
    seed: int = 0


@dataclass
class Twin:
    """One model's part of the story."""

    name: str
    parameters: int
    step_seconds: float
    losses: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    train_tokens_per_s: float = 0.0
    results: list[LengthResult] = field(default_factory=list)
    state_bytes: int = 0
    constant_state: bool = True


@dataclass
class DemoResult:
    """Everything the report tells."""

    twins: list[Twin]
    steps: int
    source: str
    train_tokens: int
    heldout_tokens: int
    scored_tokens: int
    sample_prompt: str = ""
    sample: str = ""
    decode_tokens_per_s: float = 0.0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


class _Losses(Observer):
    def __init__(self, twin: Twin) -> None:
        self.twin = twin

    def step(self, record: StepRecord) -> None:
        self.twin.losses.append(record.loss)


def run(settings: DemoSettings, console: Console) -> DemoResult:
    """Run the whole demo into ``settings.out`` (checkpoints and data; the report is the caller's).

    Raises UserError when the text is too short to measure anything on.
    """
    story = Story(console, stages=7)
    train, heldout, source = _prepare(story, settings)
    done = story.stage("calibrating", "Timing a step of each model, so that all fit into the time there is")
    loader = Loader(train, BATCH, LENGTH, settings.seed)
    _choose_threads(story, loader, settings.seed)
    twins = [_calibrate(name, loader, settings.seed) for name in TWINS]
    seconds = MARGIN * SHARES["training"] * settings.seconds
    steps = max(20, int(seconds / sum(t.step_seconds for t in twins)))
    for twin in twins:
        story.say(f"{twin.name:<11} {1000 * twin.step_seconds:.0f} ms a step of {BATCH * LENGTH} tokens")
    story.say(f"so {steps} steps for each: {steps * BATCH * LENGTH:,} tokens")
    done()

    done = story.stage("training", "Training the four models on the same batches")
    models: dict[str, SambaLM] = {}
    last = steps
    for twin in sorted(twins, key=lambda t: -t.step_seconds):  # the slowest first: it decides how far all can come
        models[twin.name] = _train(twin, loader, steps, last, settings.seed, console)
        if len(twin.losses) < last:
            last = len(twin.losses)
            story.say(f"the machine got busy: stopped at step {last} of {steps}, and the next ones there too")
    done()

    done = story.stage("evaluation", f"Perplexity on held-out text, at 1 to 16 times the {LENGTH} tokens trained on")
    scored = _evaluate(story, twins, models, heldout, SHARES["evaluation"] * settings.seconds)
    console.print(perplexity_table(twins))
    done()

    done = story.stage("saving", "Saving, reloading and verifying the checkpoints")
    for twin in twins:
        models[twin.name] = _save_and_verify(story, models[twin.name], settings.out / twin.name, train.tokenizer)
    done()

    result = DemoResult(twins, last, source, train.num_tokens, heldout.num_tokens, scored)
    done = story.stage("generating", "Text from the reloaded samba-tiny, as it is made")
    _generate(story, result, models["samba-tiny"], train.tokenizer, heldout)
    done()
    result.seconds, result.stages = story.elapsed, story.times
    story.stage("report", "Writing the report")
    return result


def _prepare(story: Story, settings: DemoSettings) -> tuple[TokenDataset, TokenDataset, str]:
    what = ", ".join(p.name for p in settings.texts) or "Python's standard library and its language reference"
    done = story.stage("preparing", f"Preparing text: {escape(what)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    files = gather(settings.out, settings.texts)
    data = settings.out / "data"
    prepare(
        files,
        data,
        ByteTokenizer(),
        errors="strict" if settings.texts else "replace",
        suffixes=(".py",),
        val_fraction=0.1,
        overwrite=True,
    )
    train, heldout = TokenDataset.open(data / "train"), TokenDataset.open(data / "val")
    story.say(
        f"{train.num_documents:,} documents ({train.num_tokens:,} bytes) to learn from, "
        f"{heldout.num_documents:,} ({heldout.num_tokens:,} bytes) held out; one token is one byte"
    )
    longest = LENGTH * MULTIPLES[-1]
    for name, dataset, least in (("training", train, (LENGTH + 1) * BATCH), ("held-out", heldout, longest)):
        if dataset.num_tokens < least:
            raise UserError(
                f"The {name} text has {dataset.num_tokens:,} bytes after the split, the demo needs {least:,}: "
                "give it more or longer files with --text."
            )
    done()
    return train, heldout, what


def _settings(steps: int, seed: int) -> TrainSection:
    return TrainSection(
        steps=steps,
        batch_size=BATCH,
        length=LENGTH,
        lr=LEARNING_RATE,
        warmup_fraction=0.05,
        seed=seed,
        device="cpu",
        log_every=max(1, steps // 10),
    )


def _calibrate(name: str, loader: Loader, seed: int) -> Twin:
    """Time steps on throwaway weights: the median of a few, after one to warm up."""
    model = checkpoint.create(name, seed=seed)
    section, parallel = _settings(100, seed), connect("cpu")
    prepare_model(model, section, parallel)
    optimizer = make_optimizer(model, section)
    times = []
    for step in range(5):
        began = time.perf_counter()
        train_step(model, optimizer, loader.batch(step), section, parallel, step=step)
        times.append(time.perf_counter() - began)
    config = model.config
    return Twin(
        name,
        config.parameters(),
        sorted(times[1:])[len(times[1:]) // 2],
        state_bytes=config.state_bytes(LENGTH * MULTIPLES[-1], activation_bytes=4),
        constant_state=config.constant_state,
    )


def _choose_threads(story: Story, loader: Loader, seed: int) -> None:
    """On cores that are busy, threads wait for each other far longer than they work: then take one."""
    threads = torch.get_num_threads()
    if threads == 1:
        return
    shared = _calibrate(TWINS[0], loader, seed).step_seconds
    torch.set_num_threads(1)
    if _calibrate(TWINS[0], loader, seed).step_seconds < shared:
        story.say(f"other programs keep the processor busy: one thread is faster than {threads}")
    else:
        torch.set_num_threads(threads)


def _train(twin: Twin, loader: Loader, steps: int, last: int, seed: int, console: Console) -> SambaLM:
    """Train by the schedule of ``steps``, but only as far as ``last``, or until patience ends."""
    model = checkpoint.create(twin.name, seed=seed)
    section = _settings(steps, seed)
    observer = Observers([_Losses(twin), progress_observer(console, section.log_every)])
    deadline = time.perf_counter() + PATIENCE * steps * twin.step_seconds + 1.0
    progress = fit(
        model,
        loader,
        section,
        observer=observer,
        stop=lambda: len(twin.losses) >= last or time.perf_counter() > deadline,
    )
    twin.train_seconds = progress.seconds
    twin.train_tokens_per_s = progress.tokens / progress.seconds
    return model


def _evaluate(
    story: Story, twins: list[Twin], models: dict[str, SambaLM], heldout: TokenDataset, seconds: float
) -> int:
    """Score held-out text for as long as there is time, a piece of it at every length by every model in turn.

    Returns how much was scored: the same text for every model and every length.
    """
    longest = LENGTH * MULTIPLES[-1]
    lengths = [LENGTH * m for m in MULTIPLES]
    pieces: dict[str, list[list[LengthResult]]] = {twin.name: [] for twin in twins}
    began = time.perf_counter()
    done = 0
    while (done + 1) * longest <= heldout.num_tokens:
        tokens = heldout.tokens(done * longest, (done + 1) * longest)
        for twin in twins:
            pieces[twin.name].append(perplexity(models[twin.name], tokens, lengths))
        done += 1
        if (time.perf_counter() - began) * (done + 1) / done > seconds:  # the next one would be too much
            break
    story.say(f"{done * longest:,} bytes at each length, every window read from a fresh state")
    for twin in twins:
        twin.results = [_together(list(each)) for each in zip(*pieces[twin.name], strict=True)]
    return done * longest


def _together(pieces: list[LengthResult]) -> LengthResult:
    """The figures of one length over all pieces, each of which holds the same number of tokens."""
    losses = torch.tensor([piece.loss for piece in pieces], dtype=torch.float64)
    error = losses.std() / len(pieces) ** 0.5 if len(pieces) > 1 else torch.tensor(float("nan"))
    return replace(
        pieces[0],
        windows=sum(piece.windows for piece in pieces),
        tokens=sum(piece.tokens for piece in pieces),
        loss=losses.mean().item(),
        standard_error=error.item(),
        perplexity=losses.mean().exp().item(),
    )


def perplexity_table(twins: list[Twin]) -> Table:
    """Perplexity a byte against context length; the last column compares the longest with the trained one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("    model")
    for m in MULTIPLES:
        table.add_column(f"{m}x" if m > 1 else f"{LENGTH}", justify="right")
    table.add_column("change", justify="right")
    for twin in twins:
        change = f"{100 * (change_in_perplexity(twin) - 1):+.0f}%"
        table.add_row(f"    {twin.name}", *(f"{r.perplexity:.2f}" for r in twin.results), change)
    return table


def change_in_perplexity(twin: Twin) -> float:
    """Perplexity at the longest context over that at the trained length: below 1, more context helped."""
    return twin.results[-1].perplexity / twin.results[0].perplexity


def verdict(twins: list[Twin], steps: int) -> str:
    """What was found about the paper's claim, in sentences that can turn out either way."""
    changes = {twin.name: change_in_perplexity(twin) for twin in twins}
    samba, llama = changes["samba-tiny"], changes["llama-tiny"]
    holds, degrades = samba <= 1.02, llama >= 1.05 and llama >= samba + 0.03
    if holds and degrades:
        found = "the claim holds in this run"
    elif steps < FEW_STEPS:
        found = f"{steps} steps are too few to tell"
    elif holds or degrades:
        found = f"only {'Samba' if holds else 'full attention'}'s half of it holds in this run"
    else:
        found = "it does not hold in this run"
    shown = {name: f"{100 * (change - 1):+.1f}%" for name, change in changes.items()}
    others = ", ".join(f"{name} by {shown[name]}" for name in changes if name not in ("samba-tiny", "llama-tiny"))
    best = min(twins, key=lambda twin: twin.results[-1].perplexity)
    return (
        "The paper's claim is that Samba holds or improves past its trained length while full attention degrades. "
        f"Here, from {LENGTH} to {LENGTH * MULTIPLES[-1]} tokens, samba-tiny's perplexity changed by "
        f"{shown['samba-tiny']} and llama-tiny's by {shown['llama-tiny']}: {found}. "
        + (f"For comparison: {others}. " if others else "")
        + f"The lowest at {LENGTH * MULTIPLES[-1]} is {best.name}'s {best.results[-1].perplexity:.2f}."
    )


def _save_and_verify(story: Story, model: SambaLM, folder: Path, tokenizer: Tokenizer) -> SambaLM:
    checkpoint.save(model, folder, tokenizer)
    loaded, _ = checkpoint.load(folder)
    probe = torch.arange(2 * LENGTH)[None] % 256
    with torch.inference_mode():
        same = torch.equal(model(probe)[0], loaded(probe)[0])
    if not same:
        raise RuntimeError(f"{folder} gives other logits than the model it was saved from")
    story.say(f"{escape(str(folder))}: reloaded, the same logits bit for bit")
    return loaded


def _generate(story: Story, result: DemoResult, model: SambaLM, tokenizer: Tokenizer, heldout: TokenDataset) -> None:
    document = tokenizer.decode(heldout.document(0)[: LENGTH // 2])
    result.sample_prompt = document[: document.rfind("\n") + 1] or document
    text = stream(model, tokenizer, result.sample_prompt, max_tokens=400, temperature=0.8, seed=0)
    story.say("after the beginning of a held-out file:")
    story.console.print()
    story.console.out(result.sample_prompt, end="", style="dim", highlight=False)
    pieces = []
    for piece in text:
        pieces.append(piece)
        story.console.out(piece, end="", highlight=False)
    story.console.print("\n")
    result.sample, result.decode_tokens_per_s = "".join(pieces), text.timing.decode_tokens_per_second
    story.say(
        f"{text.timing.new_tokens} tokens at {result.decode_tokens_per_s:.0f} a second, "
        f"in a state of {model.config.state_bytes(activation_bytes=4):,} bytes however long it goes on"
    )
