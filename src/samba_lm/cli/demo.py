"""``samba-lm demo``: a minute with the model that comes along, or a comparison trained on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from samba_lm import shipped
from samba_lm.cli.model import OptionalCheckpoint, base_note, load_with_tokenizer
from samba_lm.cli.output import JsonFile, provenance, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

TOUR_SECONDS, FULL_SECONDS, QUICK_SECONDS = 60.0, 300.0, 66.0


@dataclass(frozen=True)
class Demo:
    """A minute with a small trained model on this machine's processor: it writes, it is asked for a number hidden in a
    long document, and its perplexity is measured at longer and longer contexts. A page tells all of it. Nothing is
    downloaded.

    With --train: train samba-tiny and its Llama, SWA and Mamba twins instead, measure what happens past the trained
    length, generate text, and write a page on that."""

    checkpoint: Positional[OptionalCheckpoint] = shipped.DEFAULT
    """A checkpoint folder, or a training run's: its newest checkpoint; samba-nano comes along. (Not with --train.)"""
    text: tuple[Path, ...] = ()
    """Read these files or folders (.txt, .jsonl, ...): the number is hidden in them and the curve is theirs. With
    --train, learn from them instead of from Python's standard library."""
    out: Path = Path("samba-demo")
    """Folder for the page and its figures; with --train for the checkpoints and the data too."""
    seconds: float | None = None
    """Take about this long; the long document is made shorter for it where it must. (default: 60, with --train 300)"""
    train: bool = False
    """Train and compare four small models."""
    quick: bool = False
    """With --train: take about a minute instead of five; the models learn less."""
    minutes: float | None = None
    """With --train: take this long instead."""
    seed: int = 0
    """Of the story; with --train of the weights and of the order of the batches. (The number is always a new one.)"""
    json: JsonFile = None
    """Also write the figures to this file (OUT/report.json always holds them)."""


def main(argv: list[str]) -> None:
    """Run the command."""
    args = parse(Demo, argv, prog="samba-lm demo")
    if args.train:
        _train(args)
    else:
        _tour(args)


def _tour(args: Demo) -> None:
    if args.quick or args.minutes is not None:
        raise UserError("--quick and --minutes are for --train, which trains: give --train too, or --seconds.")
    seconds = TOUR_SECONDS if args.seconds is None else args.seconds
    if not 10 <= seconds <= 3600:
        raise UserError(f"--seconds {seconds:g} must be from 10 to 3600.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} must be from 0 to {2**32 - 1}.")
    console = Console()
    from samba_lm.demo.folder import check
    from samba_lm.demo.story import Story

    story = Story(console, stages=5)
    check(args.out, args.text)
    model, tokenizer = load_with_tokenizer(args.checkpoint, "cpu", None)
    from samba_lm.demo.tour import TourSettings, run
    from samba_lm.demo.tour_page import record, write_page

    note = base_note(args.checkpoint)
    console.print(f"[bold]samba-lm demo[/bold], about {seconds:.0f} seconds. {note or ''}", highlight=False)
    result = run(
        TourSettings(args.out, args.text, seconds, args.seed), args.checkpoint, model, tokenizer, console, story
    )
    story.stage("page", "The page")
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {**provenance(), "device": "cpu"}
    page = write_page(result, facts, args.out)
    result.seconds = story.elapsed
    for path in (args.out / "report.json", args.json):
        if path is not None:
            write_json(path, {**facts, **record(result)})
    console.print(f"    [bold]{page}[/bold], after {result.seconds:.0f} seconds", highlight=False, soft_wrap=True)
    program, given = _program(), "" if args.checkpoint == shipped.DEFAULT else f"{shlex.quote(args.checkpoint)} "
    console.print(
        f"\nGo on with, for example:\n  {program} generate {given}\"Once upon a time\"\n"
        f"  {program} demo {given}--text a-book.txt\n  {program} demo --train",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _train(args: Demo) -> None:
    if args.checkpoint != shipped.DEFAULT:
        raise UserError(
            f"--train trains models of its own, and {args.checkpoint!r} was given: leave one of the two out."
        )
    given = [name for name, value in (("--seconds", args.seconds), ("--minutes", args.minutes)) if value is not None]
    if len(given) > 1:
        raise UserError("--seconds and --minutes were both given: give one of them.")
    seconds = QUICK_SECONDS if args.quick else FULL_SECONDS
    seconds = 60 * args.minutes if args.minutes is not None else args.seconds or seconds
    if not 30 <= seconds <= 86_400:
        said = f"--minutes {args.minutes}" if args.minutes is not None else f"--seconds {args.seconds:g}"
        raise UserError(f"{said} must be from half a minute (four models need that) to a day.")
    from samba_lm.demo.folder import clean
    from samba_lm.demo.report import record, write_report
    from samba_lm.demo.run import DemoSettings, run, verdict

    clean(args.out, args.text)
    console = Console()
    result = run(DemoSettings(args.out, args.text, seconds, args.seed), console)
    facts = {**provenance(), "device": "cpu"}
    report = write_report(result, facts, args.out)
    for path in (args.out / "report.json", args.json):
        if path is not None:
            write_json(path, {**facts, **record(result)})
    console.print(f"    [bold]{report}[/bold]", highlight=False)
    console.print(f"\n{verdict(result.twins, result.steps)}", highlight=False)
    checkpoint = shlex.quote(str(args.out / "samba-tiny"))
    console.print(f"\nGo on with, for example:\n  {_program()} generate {checkpoint} --prompt 'def '", highlight=False)


def _program() -> str:
    """How to call samba-lm from here: by its name, or by its path where the environment is not active."""
    beside = Path(sys.executable).with_name("samba-lm")
    if shutil.which("samba-lm") is not None or not beside.exists():
        return "samba-lm"
    return shlex.quote(os.path.relpath(beside))
