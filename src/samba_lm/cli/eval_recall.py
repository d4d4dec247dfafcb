"""``samba-lm eval passkey`` and ``eval phonebook``: what checkpoints find again in long texts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from samba_lm.cli.eval import (
    Checkpoints,
    Lengths,
    Output,
    OutputOptions,
    about,
    check_checkpoints,
    label,
    measuring,
)
from samba_lm.cli.model import Runtime, RuntimeOptions
from samba_lm.cli.parse import parse, several
from samba_lm.cli.recall_results import RecallResults, by_size
from samba_lm.cli.results import Model
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.eval.recall import Cell, Plan, Task
    from samba_lm.tokenizer import Tokenizer

MakeTask = Callable[["Tokenizer"], "Task"]


def _depths(words: list[str]) -> tuple[float, ...]:
    said = words[0]
    if said.isascii() and said.isdecimal() and int(said) > 1:
        _at_most("--depths", int(said), 10_000)
        return tuple(round(i / (int(said) - 1), 6) for i in range(int(said)))
    try:
        return tuple(float(part) for part in said.split(","))
    except ValueError:
        raise UserError(
            f"--depths = {said}: expected how many, such as 11, or depths from 0 to 1 with commas between."
        ) from None


def _at_most(option: str, count: int, limit: int) -> None:
    """Raise UserError for more of something than could ever be asked about."""
    if count > limit:
        raise UserError(f"{option} names {count:,}: give at most {limit:,}.")


def _pairs(words: list[str]) -> tuple[int, ...]:
    said = words[0]
    span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)(?::([0-9]+))?", said)
    if span is not None:
        first, last, step = int(span[1]), int(span[2]), int(span[3] or 20)
        if not step or first > last:
            wrong = f"{first} is more than {last}" if step else "steps of 0 lead nowhere"
            raise UserError(f"--pairs = {said}: {wrong}: give FIRST..LAST or FIRST..LAST:STEP, such as 20..480:10.")
        _at_most("--pairs", len(range(first, last + 1, step)), 10_000)
        return tuple(range(first, last + 1, step))
    if re.fullmatch(r"[0-9]+(,[0-9]+)*", said):
        return tuple(dict.fromkeys(map(int, said.split(","))))
    raise UserError(f"--pairs = {said}: expected FIRST..LAST, FIRST..LAST:STEP or numbers with commas between.")


Depths = Annotated[tuple[float, ...], several("INT|FLOAT,FLOAT,...", _depths, "{:g}".format)]
Pairs = Annotated[tuple[int, ...], several("INT..INT|INT,INT,...", _pairs)]


@dataclass(frozen=True)
class Passkey:
    """Hide a five-digit key in much that does not matter, and ask for it at the end. An answer is right when its first
    run of digits is the key. Texts have as many tokens as the length says, answer and all, within one sentence."""

    checkpoints: Checkpoints
    """Checkpoint folders, or training runs' (their newest steps)."""
    lengths: Lengths = (4096, 8192, 16384)
    """Tokens of the texts. (The paper's: 4096, 8192 and so on to 262144.)"""
    depths: Depths = tuple(i / 10 for i in range(11))
    """How much of the filler stands before the key: a number of depths from 0 to 1, or the depths themselves."""
    keys: int = 5
    """Texts at each length and depth, each with a key of its own."""
    filler: Path | None = None
    """Hide the key among this text file's sentences, which is harder; by default among the few of the usual form."""
    control: bool = False
    """Ask each question again with the state set to zero just before it: no answer may then be right."""
    seed: int | None = None
    """Draw the keys from this seed; by default from the operating system's randomness."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    output: OutputOptions = field(default_factory=Output)


@dataclass(frozen=True)
class Phonebook:
    """Give a phonebook, two of its entries as examples, and a third's name: an answer is right when all of it, up to
    the end of the line, is the number."""

    checkpoints: Checkpoints
    """Checkpoint folders, or training runs' (their newest steps)."""
    pairs: Pairs = tuple(range(20, 481, 20))
    """Entries of the books: 20..480 (every 20), 20..480:10 (every 10), or the numbers themselves."""
    prompts: int = 128
    """Books of each size."""
    names: tuple[Path, ...] = ()
    """A file with a name a line, or one of first and one of last names; by default the names are faker's."""
    control: bool = False
    """Ask each question again with the state set to zero just before it: no answer may then be right."""
    seed: int | None = None
    """Draw the books from this seed; by default from the operating system's randomness."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    output: OutputOptions = field(default_factory=Output)


def main(argv: list[str]) -> None:
    """Run ``samba-lm eval passkey`` or ``eval phonebook``, whichever is the first word."""
    {"passkey": _passkey, "phonebook": _phonebook}[argv[0]](argv[1:])


def _passkey(argv: list[str]) -> None:
    options = parse(Passkey, argv, prog="samba-lm eval passkey")
    depths = tuple(sorted(set(options.depths)))
    plan = _plan(options, tuple(sorted(set(options.lengths))), depths, options.keys)
    from samba_lm.data.recall import read_text
    from samba_lm.eval.passkey import PasskeyTask

    filler = None if options.filler is None else read_text(options.filler)
    _run(options, plan, lambda tokenizer: PasskeyTask(plan, tokenizer, filler))


def _phonebook(argv: list[str]) -> None:
    options = parse(Phonebook, argv, prog="samba-lm eval phonebook")
    plan = _plan(options, tuple(sorted(set(options.pairs))), (None,), options.prompts)
    from samba_lm.data.names import Names
    from samba_lm.eval.phonebook import PhonebookTask

    names = Names.from_files(options.names) if options.names else Names.from_faker()
    _run(options, plan, lambda tokenizer: PhonebookTask(plan, tokenizer, names))


def _plan(options: Passkey | Phonebook, sizes: tuple[int, ...], depths: Sequence[float | None], trials: int) -> Plan:
    """What is asked. Mistakes in it and in the files' names are told before a model is loaded."""
    options.output.check()
    option = "--keys" if isinstance(options, Passkey) else "--prompts"
    if trials < 1:
        raise UserError(f"{option} = {trials}: give 1 at least.")
    _at_most(option, trials, 100_000)
    from samba_lm.eval.recall import Plan  # only now: --help should not wait for torch

    return Plan(sizes, tuple(depths), trials, options.seed, options.control)


def _run(options: Passkey | Phonebook, plan: Plan, make_task: MakeTask) -> None:
    """Measure every checkpoint, tell and write what was found."""
    from samba_lm.eval.recall import measure

    output = options.output
    check_checkpoints(options.checkpoints)
    results: RecallResults | None = None
    models: list[Model] = []
    console = Console()
    with contextlib.ExitStack() as stack:
        for name in options.checkpoints:
            model, tokenizer = options.runtime.load(name)
            task = make_task(tokenizer)
            if results is None:
                results = stack.enter_context(RecallResults(output.json, task))
            facts = about(name, model, tokenizer, options.runtime.adapter)
            done = frozenset(cell.key for cell in results.of(facts))
            with measuring(label(name, options.checkpoints)) as tell:
                for cell in measure(model, tokenizer, task, without=done, progress=tell):
                    results.add(facts, cell)
            models.append(facts)
            _print(console, name, task, results.of(facts), kept=len(done))
    assert results is not None
    if output.csv is not None:
        results.write_csv(output.csv, models)
    if output.figure is not None:
        _draw(output.figure, results, models)
    _check_controls([cell for facts in models for cell in results.of(facts)])


def _draw(path: Path, results: RecallResults, models: Sequence[Model]) -> None:
    """Runs of which several steps were measured, and nothing else, as curves over the steps."""
    from samba_lm.eval.recall_figure import spots_of, write_figure
    from samba_lm.eval.recall_steps import by_run, lines, step_curves
    from samba_lm.figures import save_figure

    spots = {str(facts["checkpoint"]): spots_of(results.of(facts)) for facts in models}
    runs = by_run(spots)
    if sum(map(len, runs.values())) == len(spots) and lines(runs, results.unit):
        save_figure(path, step_curves(runs, results.unit, title="bars: 95% intervals"))
        return
    names = [str(facts["name"]) for facts in models]
    found = {label(name, names): results.of(facts) for name, facts in zip(names, models, strict=True)}
    write_figure(path, results.plan, found)


def _check_controls(cells: Sequence[Cell]) -> None:
    from samba_lm.eval.recall import Count

    count = Count.of(cells)
    if count.control_right:
        raise UserError(
            f"With the state set to zero, {count.control_right} of {count.total} answers are still right: something "
            "but the state tells them, so these results say nothing."
        )


def _print(console: Console, name: str, task: Task, cells: Sequence[Cell], *, kept: int) -> None:
    plan = task.plan

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    texts, many = f"{plan.trials} text{'s' * (plan.trials != 1)}", len(plan.cells)
    say(f"{name}: {task.name}, {texts} in {'one cell' if many == 1 else f'each of {many} cells'}")
    if kept:
        say(f"{kept} of the cells were measured before.")
    wide = console.width >= 70
    table = Table(show_edge=False, pad_edge=False)
    headings = [task.unit, "right", "share", "95%"]
    if wide:
        headings += ["exact", *(["control"] if plan.control else []), *(["by depth"] if len(plan.depths) > 1 else [])]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in by_size([cell for cell in cells if cell.trials]):
        low, high = (f"{100 * float(str(row[end])):.0f}" for end in ("low", "high"))
        share = f"{100 * float(str(row['accuracy'])):.1f}%"
        figures = [str(row["size"]), f"{row['right']}/{row['total']}", share, f"{low}-{high}"]
        if wide:
            figures.append(str(row["exact"]))
            figures += [str(row["control_right"])] if plan.control else []
            here = [cell for cell in cells if cell.size == row["size"]]
            figures += [_by_depth(here)] if len(plan.depths) > 1 else []
        table.add_row(*figures)
    console.print(table)
    for reason, sizes in _skipped(cells).items():
        say(f"Skipped {', '.join(map(str, sizes))}: {reason}.")


def _by_depth(cells: Sequence[Cell]) -> str:
    """A sign for each depth: + all right, - none, else how many tenths."""
    signs = ""
    for cell in cells:
        right, total = sum(trial.right for trial in cell.trials), len(cell.trials)
        signs += " " if not total else "+" if right == total else "-" if not right else str(10 * right // total)
    return signs


def _skipped(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """The sizes that were left out, by the reason."""
    found: dict[str, list[int]] = {}
    for cell in cells:
        if cell.skipped and cell.size not in found.setdefault(cell.skipped, []):
            found[cell.skipped].append(cell.size)
    return found
