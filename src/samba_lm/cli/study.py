"""``samba-lm study STUDY``: train and measure all that a study's file names; ``study table`` makes its tables."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional

from samba_lm.cli.output import provenance
from samba_lm.cli.parse import parse, several
from samba_lm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from samba_lm.study.plan import Estimates, Job, Planner
    from samba_lm.study.process import Place
    from samba_lm.study.record import Record
    from samba_lm.study.runner import Outcome

PROG = "samba-lm study"
STUDIES = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("recipes/*/study.toml"))}
"""The studies that come with samba-lm, by name."""


def _names(words: list[str]) -> tuple[str, ...]:
    return tuple(filter(None, (word.strip() for word in words[0].split(","))))


Names = Annotated[tuple[str, ...], several("NAME,NAME,...", _names)]


@dataclass(frozen=True)
class StudyCommand:
    study: Annotated[Positional[Path], tyro.conf.arg(metavar="STUDY")]
    """A study's folder (with a study.toml) or file, or the name of one that comes with samba-lm."""
    out: Path | None = None
    """Folder for what comes of it: a JSON file for each training. By default runs/ and the study's name."""
    only: Names = ()
    """Only these runs (and the sweeps that they need)."""
    stage: Names = ("sweep", "final")
    """Only these stages: sweep (short trainings, to find the learning rates), final (whole ones)."""
    gpus: int | None = None
    """GPUs to use, each for one training at a time; by default all. 0: the CPU."""
    workers: int | None = None
    """Trainings at once; by default one for each GPU, or one on a CPU. More than GPUs share them."""
    seconds: float | None = None
    """Time for this command: what would not end in it is not begun, what still runs then is stopped and continued by
    the next one."""
    dry_run: Annotated[bool, FlagCreatePairsOff] = False
    """Only say what would be done."""


@dataclass(frozen=True)
class TableCommand:
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder that `samba-lm study` wrote."""
    out: Path | None = None
    """Folder for tables and figures; by default DIR/tables."""


DESCRIPTION = f"""Train every recipe that STUDY names, first shortly at several learning rates, then whole at the best
of them, and measure each. STUDY is a folder with a study.toml, such a file (docs/studies.md tells what stands in it),
or one that comes with samba-lm: {", ".join(STUDIES)}.

A training is a process that writes one JSON file into OUT/RUN/. What is there is not done again; what was stopped,
however that was, goes on where it was with the same command. One that fails does not stop the others.

`samba-lm study table DIR` makes tables and figures of it."""


def main(argv: list[str]) -> None:
    """Run the command. Exits with 1 when trainings failed or diverged, with 128 + the signal when one stopped it."""
    if argv and argv[0] == "table":
        return _table(argv[1:])
    return _run(parse(StudyCommand, argv, prog=PROG, description=DESCRIPTION), argv)


def find_study(name: Path) -> Path:
    """The study's folder or file: ``name`` is its path, or one of :data:`STUDIES`. Raises UserError."""
    if name.exists():
        return name
    if str(name) in STUDIES:
        return STUDIES[str(name)]
    near = did_you_mean(str(name), [*STUDIES, "table"])
    hint = near if "mean" in near else f" Known: {', '.join(STUDIES)}."
    raise UserError(f"There is no study {str(name)[:80]!r}.{hint} Give a folder with a study.toml, or such a file.")


def _run(command: StudyCommand, argv: list[str]) -> None:
    from samba_lm.study.plan import Planner, parse_stages
    from samba_lm.study.record import read_records
    from samba_lm.study.runner import Runner, check_folder
    from samba_lm.study.study import StudyData, check_recipes, read_study
    from samba_lm.study.view import study_view

    stages = parse_stages(",".join(command.stage))
    for option, value, least in (("--gpus", command.gpus, 0), ("--workers", command.workers, 1)):
        if value is not None and value < least:
            raise UserError(f"{option} = {value}: at least {least}.")
    if command.seconds is not None and not command.seconds > 0:
        raise UserError(f"--seconds = {command.seconds:g}: more than 0.")
    path = find_study(command.study)
    study, recipes = read_study(path)
    check_recipes(study, recipes)
    out = command.out or Path("runs") / _name(path)
    check_folder(out)
    planner = Planner(study, recipes, out, StudyData(), stages, frozenset(command.only))
    planner.data.check(study, recipes, planner.data_of())
    console = Console()
    if command.dry_run:
        records = read_records(out) if out.is_dir() else {}
        return _show(console, planner, records)
    places = _places(command.gpus, command.workers)
    with study_view(console, len(places)) as view:
        outcome = Runner(planner, places, provenance(), view, command.seconds).run()
    return _close(console, outcome, out, argv)


def _name(study: Path) -> str:
    path = study.resolve()
    return path.name if path.is_dir() else path.parent.name if path.name == "study.toml" else path.stem


def _places(gpus: int | None, workers: int | None) -> list[Place]:
    """Where the workers compute."""
    from samba_lm.study.process import Place

    visible = _visible_gpus()
    if gpus is not None and gpus > len(visible):
        raise UserError(f"--gpus = {gpus}, but {len(visible)} found: give fewer, or 0 for the CPU.")
    used = visible[: len(visible) if gpus is None else gpus]
    number = workers or len(used) or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // number))
    if used:
        chosen = [used[i % len(used)] for i in range(number)]
        return [
            Place(f"GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads}, chosen.count(gpu))
            for gpu in chosen
        ]
    return [Place("the CPU", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}, number) for _ in range(number)]


def _visible_gpus() -> list[str]:
    """The GPUs that a child may be given, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    found = torch.cuda.device_count()  # honours CUDA_VISIBLE_DEVICES
    named = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return named[:found] if named else [str(i) for i in range(found)]


def _show(console: Console, planner: Planner, records: dict[str, Record]) -> None:
    """What would be done."""
    from samba_lm.study.plan import Estimates
    from samba_lm.study.view import summary

    plan = planner.plan(records)
    estimates = Estimates(records)
    table = Table(box=None, pad_edge=False, header_style="bold")
    wide = console.width >= 84
    for heading in ("run", "stage", "lr", "seed", *(("steps", "tokens") if wide else ()), "about", "state"):
        table.add_column(heading, justify="left" if heading in ("run", "stage", "state") else "right", no_wrap=True)
    for job in plan.jobs:
        state = _state(job.settled(records.get(job.key)), records.get(job.key))
        table.add_row(job.run, job.stage, f"{job.lr:g}", str(job.seed), *_costs(job, estimates, wide), state)
    for each in plan.waiting:
        for job in each.jobs:
            state = each.reason or f"waits for {each.family}'s sweep"
            table.add_row(job.run, job.stage, "?", str(job.seed), *_costs(job, estimates, wide), state)
    console.print(table)
    console.print(summary(plan, records, estimates, 1), highlight=False)


def _costs(job: Job, estimates: Estimates, wide: bool) -> tuple[str, ...]:
    from samba_lm.train.progress import count, duration

    seconds = estimates.seconds(job)
    about = "" if seconds is None else duration(seconds)
    return (f"{job.steps:,}", count(job.tokens), about) if wide else (about,)


def _state(settled: bool, record: Record | None) -> str:
    if record is None:
        return "to do"
    if settled:
        return record.status
    return "failed, to do again" if record.status == "failed" else "to do again (changed)"


def _close(console: Console, outcome: Outcome, out: Path, argv: list[str]) -> None:
    """Say how it ended."""

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    for record in outcome.bad:
        say(f"{record.status}: {record.key}: {record.reason}")
    for each in outcome.plan.waiting:
        if each.reason:
            say(f"not begun: {each.run}: {each.reason}")
    unfinished = len(outcome.left) + sum(len(each.jobs) for each in outcome.plan.waiting)
    if outcome.interrupted is not None or outcome.out_of_time:
        why = "Stopped early" if outcome.interrupted is not None else "The time is over"
        say(f"{why}; {unfinished} job(s) to do. To go on: {shlex.join([*PROG.split(), *argv])}")
    elif not outcome.bad and not unfinished:
        say(f"All {len(outcome.plan.jobs)} done. Tables: {PROG} table {shlex.quote(str(out))}")
    if outcome.interrupted is not None:
        raise SystemExit(128 + outcome.interrupted)
    if outcome.bad or (unfinished and not outcome.out_of_time):
        raise SystemExit(1)


def _table(argv: list[str]) -> None:
    command = parse(TableCommand, argv, prog=f"{PROG} table")
    from samba_lm.study.tables import write_tables

    written = write_tables(command.folder, command.out or command.folder / "tables")
    for path in written:
        print(path)
