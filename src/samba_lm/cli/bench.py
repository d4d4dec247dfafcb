"""``samba-lm bench``: timings of operations and whole models on this machine, parity checked first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table

from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.bench.timing import Figure

MAX_THREADS = 1024

What = Literal["scan", "model", "memory"]


@dataclass(frozen=True)
class Bench:
    """Measure on the CPU: the selective scan, a Mamba-130M-shape model against transformers and against the memory's
    bandwidth, and the peak memory of reading a million tokens. Run it on a machine that does nothing else."""

    what: Annotated[tuple[What, ...], tyro.conf.Positional] = ()
    """Which ones; all without it."""
    threads: int | None = None
    """CPU threads; by default as many as torch takes."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run the command."""
    args = parse(Bench, argv, prog="samba-lm bench")
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise UserError(f"--threads {args.threads} must be from 1 to {MAX_THREADS}.")
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    figures: dict[str, list[Figure]] = {}
    for what in args.what or get_args(What):
        with console.status(f"measuring {what}"):
            figures[what] = _runners()[what]()
        console.print(_table(figures[what]))
    if args.json is not None:
        record = {what: [{**asdict(f), "met": f.met} for f in found] for what, found in figures.items()}
        write_json(args.json, {"figures": record})


def _runners() -> dict[str, Callable[[], list[Figure]]]:
    from samba_lm.bench.language_model import run_language_model
    from samba_lm.bench.memory import run_memory
    from samba_lm.bench.scan import run_scan

    return {"scan": run_scan, "model": run_language_model, "memory": run_memory}


def _table(figures: list[Figure]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column()
    for figure in figures:
        relation = "at most" if figure.low_is_good else "at least"
        bar = "" if figure.bar is None else f"{relation} {figure.bar:g}: {'met' if figure.met else 'MISSED'}"
        table.add_row(figure.name, f"{figure.value:.4g} {figure.unit}".strip(), bar)
    return table
