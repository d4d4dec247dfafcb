"""``samba-lm demo``: the main job in one command."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from samba_lm.cli.output import JsonFile, provenance, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

FULL_SECONDS, QUICK_SECONDS = 300.0, 66.0


@dataclass(frozen=True)
class Demo:
    """Train samba-tiny and its Llama, SWA and Mamba twins on this machine, measure what happens past the trained
    length, generate text, and write a report. Nothing is downloaded."""

    text: tuple[Path, ...] = ()
    """Learn from these files or folders (.txt, .jsonl, ...) instead of Python's standard library."""
    out: Path = Path("samba-demo")
    """Folder for the report, the checkpoints and the data."""
    quick: bool = False
    """Take about a minute instead of five; the models learn less."""
    minutes: float | None = None
    """Take this long instead."""
    seed: int = 0
    """Of the weights and of the order of the batches."""
    json: JsonFile = None
    """Also write the figures to this file (OUT/report.json always holds them)."""


def main(argv: list[str]) -> None:
    """Run the command."""
    args = parse(Demo, argv, prog="samba-lm demo")
    seconds = 60 * args.minutes if args.minutes is not None else QUICK_SECONDS if args.quick else FULL_SECONDS
    if not 30 <= seconds <= 86_400:
        raise UserError(f"--minutes {args.minutes} must be from 0.5 (four models need that) to 1440.")
    from samba_lm.demo.report import record, write_report
    from samba_lm.demo.run import DemoSettings, clean, run, verdict

    clean(args.out, args.text)
    console = Console()
    result = run(DemoSettings(args.out, args.text, seconds, args.seed), console)
    facts = provenance()
    report = write_report(result, facts, args.out)
    for path in (args.out / "report.json", args.json):
        if path is not None:
            write_json(path, record(result))
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
