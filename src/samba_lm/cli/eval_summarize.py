"""``samba-lm eval summarize``: what checkpoints write of long texts, against people's summaries."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from samba_lm.cli.eval import Checkpoints, about, check_checkpoints, label, measuring
from samba_lm.cli.model import Runtime, RuntimeOptions
from samba_lm.cli.output import JsonFile, check_different, output_file
from samba_lm.cli.parse import parse
from samba_lm.cli.results import Results, write_rows
from samba_lm.errors import UserError
from samba_lm.eval.records import read_records
from samba_lm.eval.summary_tasks import TASKS, Sample, Task

if TYPE_CHECKING:
    from samba_lm.eval.summaries import Summary

PROG = "samba-lm eval summarize"
DESCRIPTION = """Let models write summaries of long texts and compare them with people's by ROUGE.

squality: questions about short stories (SQuALITY), at most 600 tokens, the best of four references counts.

qmsum: questions about meetings (QMSum), at most 450 tokens.

govreport: reports of the US government (GovReport), at most 450 tokens; 13 of them, which is no more than a smoke test.

Texts are read whole, then "Question: ... Answer:" (a report: "Summary of the report:"); answers are greedy. A base
model was never taught to summarise and scores low."""


@dataclass(frozen=True)
class SummarizeOptions:
    checkpoints: Checkpoints
    """Checkpoint folders, or training runs' (their newest steps)."""
    task: Literal["squality", "qmsum", "govreport"]
    """Whose texts: see above."""
    data_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the data is: FOLDER/TASK/test.jsonl, also packed (.gz, .xz, .bz2, .zst)."""
    split: str | None = None
    """Another part of the data than test: dev of squality, val of qmsum."""
    limit: int | None = None
    """Only the first so many questions."""
    max_tokens: int | None = None
    """Another limit of a summary's tokens than the task's."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    json: JsonFile = None
    """Write every summary and its scores to this file. What an earlier run left there is kept, and not made again."""
    csv: Path | None = None
    """Write the models' scores to this file."""


class SummaryResults(Results["Summary"]):
    """The summaries of several models; see :class:`Results`."""

    task = "summarize"
    items = "samples"

    def key(self, item: Summary) -> Hashable:
        return item.number

    def order(self, item: Summary) -> Any:
        return item.number

    def row(self, item: Summary) -> dict[str, object]:
        return asdict(item)

    def item(self, row: Any) -> Summary | None:
        from samba_lm.eval.summaries import Summary

        return None if row["skipped"] else Summary(**row)  # what was skipped may fit now

    def summary(self, items: Sequence[Summary]) -> dict[str, object]:
        from samba_lm.eval.summaries import means

        return {"scores": {name: asdict(mean) for name, mean in means(items).items()}}


def main(argv: list[str]) -> None:
    """Run ``samba-lm eval summarize`` with these arguments (the first is ``summarize``)."""
    options = parse(SummarizeOptions, argv[1:], prog=PROG, description=DESCRIPTION)
    for name, value in (("limit", options.limit), ("max-tokens", options.max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give at least 1. See `{PROG} --help`.")
    if options.csv is not None:
        output_file(options.csv, "--csv", "scores.csv")
    check_different({"--json": options.json, "--csv": options.csv})
    task = TASKS[options.task]
    path = task.file(options.data_dir, options.split)
    check_checkpoints(options.checkpoints)
    records = read_records(path)
    samples = task.samples(records.rows, options.limit)
    _run(options, task, samples, {"split": options.split or task.usual, "sha256": records.sha256})


def _run(options: SummarizeOptions, task: Task, samples: Sequence[Sample], data: dict[str, object]) -> None:
    """Let every checkpoint write, tell and keep what came of it."""
    from samba_lm.eval.summaries import measure, scorer  # only now: --help should not wait for torch
    from samba_lm.generation.params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens or task.max_tokens, stop=task.stop)
    settings = {
        "task": task.name,
        **data,
        "prompt": f"{{text}}{task.prompt}",
        "max_tokens": params.max_tokens,
        "stop": list(task.stop),
        "scores": scorer(),
    }
    console, names = Console(), options.checkpoints
    rows: list[dict[str, object]] = []
    with SummaryResults(options.json, settings) as results:
        for name in names:
            model, tokenizer = options.runtime.load(name)
            facts = about(name, model, tokenizer, options.runtime.adapter)
            kept = {item.number for item in results.of(facts)}
            missing = [sample for sample in samples if sample.number not in kept]
            if missing:
                with measuring(label(name, names)) as tell:
                    found = functools.partial(results.add, facts)
                    measure(model, tokenizer, missing, params, found, progress=tell)
            items = [item for item in results.of(facts) if item.number < len(samples)]
            _print(console, name, settings, items, len(kept & {sample.number for sample in samples}))
            rows.append({"checkpoint": label(name, names), "task": task.name, **_csv_row(items)})
    if options.csv is not None:
        write_rows(options.csv, rows)


def _csv_row(items: Sequence[Summary]) -> dict[str, object]:
    from samba_lm.eval.summaries import means

    found: dict[str, object] = {}
    for name, mean in means(items).items():
        found |= {"samples": mean.count, name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return found


def _print(console: Console, name: str, settings: dict[str, object], items: Sequence[Summary], kept: int) -> None:
    from samba_lm.eval.summaries import means

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    read = [item for item in items if not item.skipped]
    texts = len({item.document for item in read})
    say(f"{name}: {settings['task']}, {len(read)} summaries of {texts} text{'s' * (texts != 1)}")
    if kept:
        say(f"{kept} of them were written before.")
    if read:
        table = Table(show_edge=False, pad_edge=False)
        for heading in ("score", "mean", "95%"):
            table.add_column(heading, justify="left" if heading == "score" else "right", no_wrap=True)
        for title, mean in zip(("ROUGE-1", "ROUGE-2", "ROUGE-L"), means(items).values(), strict=True):
            interval = "-" if math.isnan(mean.low) else f"{100 * mean.low:.1f} to {100 * mean.high:.1f}"
            table.add_row(title, f"{100 * mean.mean:.1f}", interval)
        console.print(table)
        ended = sum(item.finish != "length" for item in read)
        tokens = sum(item.new_tokens for item in read) / len(read)
        say(f"{tokens:,.0f} tokens a summary; {ended} of {len(read)} came to an end by themselves.")
        say(f"By {settings['scores']}.")
    for reason in sorted({item.skipped for item in items if item.skipped}):
        count = sum(item.skipped == reason for item in items)
        say(f"Skipped, {count} question{'s' * (count != 1)}: {reason}.")
