"""``samba-lm eval harness``: tasks of lm-evaluation-harness, from a folder of files or the hub, and HumanEval."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from samba_lm import __version__
from samba_lm.cli.eval import (
    Checkpoints,
    Output,
    OutputOptions,
    about,
    check_checkpoints,
    label,
    measuring,
)
from samba_lm.cli.model import Runtime, RuntimeOptions
from samba_lm.cli.output import write_json
from samba_lm.cli.parse import parse, several
from samba_lm.cli.results import Model, Results, write_rows
from samba_lm.errors import UserError
from samba_lm.report.models import WHO

if TYPE_CHECKING:
    from samba_lm.eval.harness.answers import Answers
    from samba_lm.eval.harness.humaneval import Attempt, Problems
    from samba_lm.eval.harness.run import Harness, Metric, Score
    from samba_lm.eval.harness.run import Options as RunOptions
    from samba_lm.eval.harness.tasks import Written
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

PROG = "samba-lm eval harness"
HUMANEVAL = "humaneval"
QUIET = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "DISABLE_MULTIPROC")
"""Of the harness and its packages: bars beside ours, and processes for a second's work."""


def _names(words: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in words[0].split(",") if name.strip()))


@dataclass(frozen=True)
class HarnessOptions:
    """Measure tasks of lm-evaluation-harness: arc_easy, arc_challenge, hellaswag, winogrande, piqa, lambada, gsm8k,
    gsm8k_cot and mmlu from a folder of files, or any other from the hub; and humaneval. Prompts and metrics are the
    harness's own. Needs `pip install 'samba-lm[harness]'`."""

    checkpoints: Checkpoints
    """Checkpoint folders, or training runs' (their newest steps)."""
    tasks: Annotated[tuple[str, ...], several("TASK,TASK,...", _names)]
    """What to measure."""
    data_dir: Path | None = None
    """Take the tasks' data from this folder, in which each has its own: docs/evaluation.md tells the files. Without,
    the harness downloads it."""
    limit: int | None = None
    """Documents of each task at most, the first ones: to try things, not to report."""
    num_fewshot: int | None = None
    """Worked examples in each prompt; by default as the task says: 5 of gsm8k and mmlu, 8 of gsm8k_cot, else none."""
    chat: bool = False
    """Write prompts out by the checkpoint's chat template."""
    seed: int = 1234
    """What worked examples and HumanEval's answers are drawn by; by default the harness's."""
    batch: int | None = None
    """Texts read or written at once; by default as many as fit. Changes results by no more than rounding."""
    run_code: bool = False
    """Of humaneval: yes, run the programs that the model writes. Each runs in a sandbox, without network, other
    processes or files to write, where the system can see to that; what it cannot is said first."""
    code_samples: int = 10
    """Of humaneval: programs for each problem, drawn at temperature 0.2 and top-p 0.95. pass@1 is a mean over them."""
    task_files: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep the task files made of --data-dir in this folder, for `lm_eval --include_path DIR`."""
    harness_output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write the harness's own results into this folder, a JSON file for each checkpoint and task,"""
    log_samples: bool = False
    """with every document, prompt and answer in it."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    output: OutputOptions = field(default_factory=Output)


class HarnessResults(Results["Score"]):
    """The tasks' scores of several models; see :class:`Results`."""

    task = "harness"
    items = "tasks"

    def key(self, item: Score) -> Hashable:
        return item.task

    def order(self, item: Score) -> Any:
        return item.task

    def row(self, item: Score) -> dict[str, object]:
        return item.row()

    def item(self, row: Any) -> Score | None:
        from samba_lm.eval.harness.run import Score

        return Score.of(row)


@dataclass(frozen=True)
class _Tasks:
    """What is measured: the harness's tasks, those of them made of files, and HumanEval."""

    names: tuple[str, ...]
    harness: Harness | None
    written: dict[str, Written]
    problems: Problems | None
    code_samples: int

    def knows(self, score: Score) -> bool:
        """Whether a task is measured as this score was: from the same files."""
        if score.task == HUMANEVAL and self.problems is not None:
            same = score.data_sha256 == self.problems.sha256
            return same and score.version == f"{self.code_samples} samples"
        here = self.written.get(score.task)
        return score.data_sha256 == (None if here is None else here.sha256)


def main(argv: list[str]) -> None:
    """Run ``samba-lm eval harness`` with these arguments (the first is ``harness``)."""
    options = parse(HarnessOptions, argv[1:], prog=PROG)
    if not options.tasks:
        raise UserError(f"--tasks is empty: name one or more, such as arc_easy,hellaswag. See `{PROG} --help`.")
    for name, value in (("--batch", options.batch), ("--code-samples", options.code_samples)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1. See `{PROG} --help`.")
    options.output.check()
    if HUMANEVAL in options.tasks and not options.run_code:
        raise UserError(
            "humaneval runs the programs that the model writes: add --run-code if that is what you want. They run in a "
            "sandbox, but only a container or a machine of their own is safe against everything."
        )
    _check_installed(options)
    for name in (*QUIET, *(("HF_HUB_OFFLINE",) if options.data_dir is not None else ())):
        os.environ.setdefault(name, "1")  # before anything is imported that reads them
    check_checkpoints(options.checkpoints)
    from samba_lm.eval.harness.run import Options as RunOptions  # only now: --help should not wait for torch

    chosen = RunOptions(options.limit, options.num_fewshot, options.chat, options.seed)
    console = Console()
    with _found(options, console) as tasks:
        _run(options, chosen, tasks, console)


def _check_installed(options: HarnessOptions) -> None:
    if set(options.tasks) != {HUMANEVAL} and find_spec("lm_eval") is None:
        raise UserError("The package lm_eval is not installed: pip install 'samba-lm[harness]'.")


@contextlib.contextmanager
def _found(options: HarnessOptions, console: Console) -> Iterator[_Tasks]:
    """Find the tasks and read their data, before any model is loaded; what is written for the harness goes with it."""
    from samba_lm.eval.harness.humaneval import Problems
    from samba_lm.eval.harness.run import Harness
    from samba_lm.eval.harness.tasks import check_data, find_task, write_task

    data, problems = options.data_dir, None
    theirs = [name for name in options.tasks if name != HUMANEVAL]
    offline = [] if data is None else [find_task(name) for name in theirs]
    for task in offline:
        assert data is not None
        check_data(task, data)
    if HUMANEVAL in options.tasks:
        if data is None:
            raise UserError("humaneval needs its problems: give --data-dir a folder with humaneval/HumanEval.jsonl.")
        problems = Problems.of(data)
        _warn(console)
    with contextlib.ExitStack() as stack:
        if options.task_files is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="samba-lm-tasks-")))
        else:
            folder = options.task_files
        harness, written = None, {}
        if theirs:
            busy = "reading the tasks' data" if offline else "finding the harness's tasks, which takes a minute"
            with Console(stderr=True).status(busy):
                written = {task.name: write_task(task, data, folder) for task in offline if data is not None}
                harness = Harness(folder if offline else None)
        names = tuple(dict.fromkeys([*written, *(theirs if not offline else ())]))
        for name in names:
            assert harness is not None
            harness.check(name)
        if options.num_fewshot is not None:
            for each in written.values():
                each.check_examples(options.num_fewshot)
        yield _Tasks((*names, *([HUMANEVAL] if problems else [])), harness, written, problems, options.code_samples)


def _warn(console: Console) -> None:
    """Say what the sandbox cannot keep out here."""
    from samba_lm.eval.harness.sandbox import leaks

    open_doors = leaks()
    if open_doors:
        console.print(
            f"Here, programs under test can {', '.join(open_doors)}: run this in a container.",
            markup=False, highlight=False,
        )  # fmt: skip


def _run(options: HarnessOptions, chosen: RunOptions, tasks: _Tasks, console: Console) -> None:
    """Measure every checkpoint, tell and write what was found."""
    output, names = options.output, options.checkpoints
    found: dict[str, list[Score]] = {}
    with HarnessResults(output.json, _settings(options, chosen), {"data_dir": options.data_dir}) as results:
        for name in names:
            model, tokenizer = options.runtime.load(name)
            facts = about(name, model, tokenizer, options.runtime.adapter)
            kept = {score.task for score in results.of(facts) if tasks.knows(score)}
            for task in tasks.names:
                answers = _answers(output.json, facts, task)
                with answers or contextlib.nullcontext():
                    if task not in kept:
                        who = f"{label(name, names)}: {task}"
                        _say_kept(console, who, answers)
                        with measuring(who) as tell:
                            score = _measure(options, chosen, tasks, task, name, model, tokenizer, answers, tell)
                        results.add(facts, score)
                        results.save()
                    if answers is not None:
                        answers.forget()
            by_task = {score.task: score for score in results.of(facts)}
            found[label(name, names)] = scores = [by_task[task] for task in tasks.names]
            _print(console, name, scores, len(kept & set(tasks.names)))
    if len(found) > 1:
        _print_together(console, found)
    if output.csv is not None:
        write_rows(
            output.csv, [row for name, scores in found.items() for score in scores for row in _rows(name, score)]
        )
    if output.figure is not None:
        from samba_lm.eval.harness.figure import write_figure

        write_figure(output.figure, found)


def _answers(results: Path | None, facts: Model, task: str) -> Answers | None:
    """A model's answers to a task's requests, in a file beside the results, whose name tells model and task."""
    from samba_lm.eval.harness.answers import Answers

    if results is None:
        return None
    who = {"task": task, **{fact: facts[fact] for fact in WHO}, "samba_lm": __version__}
    digest = hashlib.sha256(json.dumps(who, sort_keys=True).encode()).hexdigest()
    return Answers(results.with_name(f"{results.name}.answers-{digest[:16]}.jsonl"), who)


def _say_kept(console: Console, who: str, answers: Answers | None) -> None:
    if answers is not None and answers.count:
        line = f"{who} was broken off: it goes on after {answers.count:,} answer{'s' * (answers.count != 1)}."
        console.print(line, markup=False, highlight=False)


def _settings(options: HarnessOptions, chosen: RunOptions) -> dict[str, object]:
    import importlib.metadata

    version = importlib.metadata.version("lm_eval") if find_spec("lm_eval") else None
    data = "harness" if options.data_dir is None else "folder"
    return {**asdict(chosen), "data": data, "lm_eval": version}


def _measure(
    options: HarnessOptions,
    chosen: RunOptions,
    tasks: _Tasks,
    task: str,
    name: str,
    model: SambaLM,
    tokenizer: Tokenizer,
    answers: Answers | None,
    tell: Any,
) -> Score:
    """Measure one task of one checkpoint."""
    place = None
    if options.harness_output is not None:
        folder = re.sub(r"[^\w.-]+", "_", label(name, options.checkpoints)).strip("_") or "model"
        place = options.harness_output / folder / f"{task}.json"
    if task == HUMANEVAL:
        from samba_lm.eval.harness.humaneval import measure

        assert tasks.problems is not None
        score, attempts = measure(
            model, tokenizer, tasks.problems, samples=options.code_samples, limit=options.limit, seed=options.seed,
            progress=tell, answers=answers,
        )  # fmt: skip
        if place is not None:
            write_json(place, {"results": {HUMANEVAL: score.row()}, "samples": _attempts(attempts, options)})
        return score
    from samba_lm.eval.harness.model import HarnessLM
    from samba_lm.templates import FolderTemplate, template_of

    assert tasks.harness is not None
    lm = HarnessLM(model, tokenizer, batch_size=options.batch, seed=options.seed)
    template = template_of(tokenizer)  # which an adapter may have brought along
    lm.name, lm.chat = name, template if isinstance(template, FolderTemplate) else None
    lm.progress, lm.answers = tell, answers
    lm.chat_template(options.chat)  # an error where there is none
    score, told = tasks.harness.run(lm, task, chosen, tasks.written.get(task), options.log_samples)
    if place is not None:
        write_json(place, told)
    return score


def _attempts(attempts: Sequence[Attempt], options: HarnessOptions) -> list[dict[str, object]]:
    return [asdict(attempt) for attempt in attempts] if options.log_samples else []


def _rows(name: str, score: Score) -> list[dict[str, object]]:
    """A task's figures as rows of a table."""
    head = {"checkpoint": name, "task": score.task, "documents": score.documents, "fewshot": score.fewshot}
    return [{**head, **asdict(metric), "version": score.version} for metric in score.metrics]


def _print(console: Console, name: str, scores: Sequence[Score], kept: int) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    say(f"{name}: {len(scores)} task{'s' * (len(scores) != 1)} of lm-evaluation-harness")
    if kept:
        say(f"{kept} of the tasks were measured before.")
    wide = console.width >= 90
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("task", *(("documents", "shots") if wide else ()), "metric", "value", "95%"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", no_wrap=True)
    for score in scores:
        for i, metric in enumerate(score.metrics):
            first = [score.task if not i else ""]
            first += [f"{score.documents:,}" if not i else "", str(score.fewshot) if not i else ""] if wide else []
            table.add_row(*first, _called(metric), _figure(metric), _interval(metric))
    console.print(table)


def _print_together(console: Console, found: dict[str, list[Score]]) -> None:
    """Each task's first figure, a column for each checkpoint."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("task", no_wrap=True)
    for name in found:
        table.add_column(name, justify="right")
    for scores in zip(*found.values(), strict=True):
        first = [score.metrics[0] for score in scores if score.metrics]
        if len(first) == len(scores):
            table.add_row(
                f"{scores[0].task} {_called(first[0])}", *(f"{_figure(one)} ({_interval(one)})" for one in first)
            )
    console.print(table)


def _called(metric: Metric) -> str:
    return metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter.partition('-')[0]})"


def _figure(metric: Metric) -> str:
    return f"{100 * metric.value:.1f}%" if metric.is_share else _short(metric.value)


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return "-"
    low, high = metric.low, metric.high
    return f"{100 * low:.1f}-{100 * high:.1f}" if metric.is_share else f"{_short(low)}-{_short(high)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.2g}"
