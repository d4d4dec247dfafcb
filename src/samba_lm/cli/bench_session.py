"""What the commands that measure a GPU share: the device, its ceilings, progress, and the file to write."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from samba_lm.cli.output import JsonFile, write_json
from samba_lm.errors import UserError

if TYPE_CHECKING:
    import torch

    from samba_lm.bench.ceilings import Ceilings
    from samba_lm.bench.figure import Figure
    from samba_lm.bench.gpu import Clock

WIDE = 170
"""Columns where the output is no terminal: no row is folded in a log."""


class Session:
    """A GPU to measure on, its ceilings, and the file to write."""

    device: torch.device
    clock: Clock
    ceilings: Ceilings

    def __init__(self, command: str, json: JsonFile) -> None:
        from samba_lm.bench.ceilings import measure_ceilings
        from samba_lm.bench.environment import environment
        from samba_lm.bench.gpu import Clock, require_gpu

        self.device = require_gpu(command)
        self.json, self.began = json, time.perf_counter()
        self.console = Console(width=None if sys.stdout.isatty() else WIDE)
        self.environment = environment(self.device)
        self.clock = Clock(self.device)
        self.ceilings = measure_ceilings(self.clock)
        self.kernels: dict[str, list[dict[str, object]]] = {}
        self.more: dict[str, object] = {}  # for the file, beside the figures
        self.console.print(self._heading(), highlight=False)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Where to tell what is being measured: on a terminal in one line, otherwise on stderr, with the seconds."""
        if sys.stdout.isatty():
            with self.console.status("") as status:
                yield status.update
        else:
            yield lambda what: print(f"{time.perf_counter() - self.began:7.1f} s  {what}", file=sys.stderr, flush=True)

    def save(self, figures: dict[str, list[Figure]]) -> None:
        """Write what is known so far."""
        if self.json is None:
            return
        record: dict[str, object] = {**self.environment, "ceilings": self.ceilings.record()}
        record["figures"] = {name: [figure.record() for figure in found] for name, found in figures.items()}
        kernels = {"kernels": self.kernels} if self.kernels else {}
        write_json(self.json, {**record, **self.more, **kernels})

    def finish(self, figures: dict[str, list[Figure]]) -> None:
        """Write everything; exit with 1 where one of our own figures is missing."""
        self.save(figures)
        failed = [figure for found in figures.values() for figure in found if figure.failed]
        if failed:
            names = "; ".join(f"{figure.name}: {figure.note or 'no parity'}" for figure in failed[:3])
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            self.console.print(f"[bold]Failed[/bold]: {names}{more}", highlight=False)
            raise SystemExit(1)

    def _heading(self) -> str:
        import torch

        packages = self.environment["packages"]
        triton = packages["triton"] if isinstance(packages, dict) else None
        return (
            f"{self.environment['device']}, driver {self.environment.get('driver')}, torch {torch.__version__}, "
            f"Triton {triton}: copies at {self.ceilings.copy / 1e12:.2f} TB/s, bf16 products at "
            f"{self.ceilings.matmul / 1e12:.0f} TFLOP/s"
        )


def within(name: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError where the option ``name`` has a value outside its limits."""
    if value is not None and not low <= value <= high:
        given = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"--{name} {given} must be from {low} to {high}.")
