"""``samba-lm eval entropy``: how widely checkpoints look, block by block, while they read worked problems."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

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
from samba_lm.cli.parse import parse
from samba_lm.cli.results import Results, write_rows
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.eval.entropy import Block, Reading
    from samba_lm.eval.records import Record

PROG = "samba-lm eval entropy"
DESCRIPTION = """Measure how widely a model looks, block by block (paper, Appendix E), in nats:

attention: the entropy of each query's weights over the keys, mean over the heads and the answer's positions.

selection: the entropy of Mamba's steps over all positions of the text, their sum made one, mean over the channels.

High is even, low is picky. Each text is a question and its answer, read from nothing."""


@dataclass(frozen=True)
class EntropyOptions:
    checkpoints: Checkpoints
    """Checkpoint folders, or training runs' (their newest steps)."""
    data: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The texts: JSON lines, also packed (.gz, .xz, .bz2, .zst). The paper's are GSM8K's test.jsonl."""
    question: str = "question"
    """The field with the question,"""
    answer: str = "answer"
    """and the one with the answer, whose positions are those that attention is measured at."""
    samples: int = 100
    """Texts to read, drawn from the file; all, where it has fewer."""
    seed: int = 0
    """What they are drawn by: with more samples, the same and others."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    output: OutputOptions = field(default_factory=Output)


class EntropyResults(Results["Reading"]):
    """The samples of several models; see :class:`Results`."""

    task = "entropy"
    items = "samples"

    def key(self, item: Reading) -> Hashable:
        return item.row

    def order(self, item: Reading) -> Any:
        return item.row

    def row(self, item: Reading) -> dict[str, object]:
        from samba_lm.eval.entropy import KINDS

        found: dict[str, object] = {name: getattr(item, name) for name in ("row", "tokens", "decoded", "skipped")}
        for kind in KINDS:
            here = {place[0]: value for place, value in item.entropies.items() if place[1] == kind}
            found[kind] = {str(block): [value.nats, value.most] for block, value in sorted(here.items())}
        return found

    def item(self, row: Any) -> Reading | None:
        from samba_lm.eval.entropy import KINDS, Entropy, Reading

        if row["skipped"]:  # that may have changed
            return None
        entropies = {
            (int(block), kind): Entropy(float(nats), float(most))
            for kind in KINDS
            for block, (nats, most) in row[kind].items()
        }
        return Reading(row["row"], row["tokens"], row["decoded"], entropies)

    def summary(self, items: Sequence[Reading]) -> dict[str, object]:
        from samba_lm.eval.entropy import by_block

        return {"blocks": [asdict(block) for block in by_block(items)]}


def main(argv: list[str]) -> None:
    """Run ``samba-lm eval entropy`` with these arguments (the first is ``entropy``)."""
    options = parse(EntropyOptions, argv[1:], prog=PROG, description=DESCRIPTION)
    if options.samples < 1:
        raise UserError(f"--samples is {options.samples}: give at least 1. See `{PROG} --help`.")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}: it must be from 0 to {2**32 - 1}. See `{PROG} --help`.")
    options.output.check()
    check_checkpoints(options.checkpoints)
    from samba_lm.eval.records import read_records  # only now: --help should not wait for torch

    records = read_records(options.data)
    fields = {"question": options.question, "answer": options.answer}
    _run(options, _drawn(records.rows, options), {"sha256": records.sha256, **fields, "seed": options.seed})


def _drawn(rows: Sequence[Record], options: EntropyOptions) -> list[Record]:
    """The rows to read, in the order in which they are drawn: more samples begin with those of fewer."""
    import numpy as np

    order = np.random.RandomState(options.seed).permutation(len(rows))
    chosen = [rows[i] for i in order[: options.samples]]
    for record in chosen:  # a mistake in the fields' names is told before a model is loaded
        record.text(options.question)
        record.text(options.answer)
    return chosen


def _run(options: EntropyOptions, records: Sequence[Record], settings: dict[str, object]) -> None:
    """Measure every checkpoint, tell and write what was found."""
    from samba_lm.eval.entropy import AFTER, BEFORE, MEANING, by_block, left_out, measure, samples

    output, names, console = options.output, options.checkpoints, Console()
    wanted = {record.row for record in records}
    settings = {**settings, "text": f"{BEFORE}{AFTER}"}
    found: dict[str, list[Block]] = {}
    tokenizers = set()
    with EntropyResults(output.json, settings, {"meaning": MEANING, "data": options.data}) as results:
        for name in names:
            model, tokenizer = options.runtime.load(name)
            facts = about(name, model, tokenizer, options.runtime.adapter)
            tokenizers.add(facts["tokenizer"])
            kept = {reading.row for reading in results.of(facts)}
            missing = [record for record in records if record.row not in kept]
            texts = samples(missing, tokenizer, options.question, options.answer)
            with measuring(label(name, names)) as tell:
                for reading in measure(model, texts, progress=tell):
                    results.add(facts, reading)
            readings = [reading for reading in results.of(facts) if reading.row in wanted]
            found[label(name, names)] = by_block(readings)
            _print(console, name, readings, found[label(name, names)], left_out(model), len(kept & wanted))
    if len(tokenizers) > 1:
        told = (
            "These models cut texts into different tokens, and more tokens have a larger entropy: compare the shares."
        )
        console.print(told, markup=False, highlight=False)
    if output.csv is not None:
        rows = [{"checkpoint": name, **asdict(block)} for name, blocks in found.items() for block in blocks]
        write_rows(output.csv, rows)
    if output.figure is not None:
        from samba_lm.eval.entropy_figure import write_figure

        write_figure(output.figure, found)


def _print(
    console: Console,
    name: str,
    readings: Sequence[Reading],
    blocks: Sequence[Block],
    without: dict[int, str],
    kept: int,
) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    read = [reading for reading in readings if not reading.skipped]
    say(f"{name}: entropy by block, {len(read)} text{'s' * (len(read) != 1)}")
    if kept:
        say(f"{kept} of the texts were read before.")
    wide = console.width >= 60
    if blocks:
        table = Table(show_edge=False, pad_edge=False)
        headings = ["block", "of", "nats", "±", *(["share", "±", "largest"] if wide else ["share"])]
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "of" else "right", no_wrap=True)
        for block in blocks:
            share, reach = (100 * value for value in (block.share, (block.share_high - block.share_low) / 2))
            figures = [str(block.block), block.kind, _figure(block.nats, 3), _figure((block.high - block.low) / 2, 3)]
            figures.append(_figure(share, 1, "%"))
            figures += [_figure(reach, 1, "%"), _figure(block.most, 3)] if wide else []
            table.add_row(*figures)
        console.print(table)
    elif read:
        say(f"No layer of {name} attends or selects, so there is nothing to measure.")
    for reason in sorted(set(without.values())):
        numbers = [str(block) for block, why in without.items() if why == reason]
        say(f"Left out, block{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {reason}.")
    for reason in sorted({reading.skipped for reading in readings if reading.skipped}):
        rows = [str(reading.row) for reading in readings if reading.skipped == reason]
        say(f"Skipped, row{'s' * (len(rows) > 1)} {', '.join(rows)}: {reason}.")


def _figure(value: float, digits: int, unit: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}{unit}"
