"""``samba-lm bench``: timings of operations and whole models on this machine, parity checked first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from samba_lm.cli.bench_table import figures_table
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.bench.figure import Figure

MAX_THREADS = 1024

What = Literal["scan", "model", "memory", "ops", "train", "prefill", "decode", "paper", "curve"]
ON_CPU: tuple[What, ...] = ("scan", "model", "memory")
ON_GPU = ("ops", "train", "prefill", "decode", "paper", "curve")


@dataclass(frozen=True)
class Bench:
    """Measure on the CPU: the selective scan, a Mamba-130M-shape model against transformers and against the memory's
    bandwidth, and the peak memory of reading a million tokens. Run it on a machine that does nothing else.

    On a CUDA GPU, each with options of its own (`samba-lm bench ops --help`): every operation's kernels (`ops`),
    training steps (`train`), reading 131,072 tokens (`prefill`), generating (`decode`), the paper's two figures of
    speed (`paper`), a training run beside the CPU's (`curve`).

    Training on several GPUs of a machine against one is measured by `samba-lm bench scale`, a running server by
    `samba-lm bench serve URL`."""

    what: Annotated[tuple[What, ...], tyro.conf.Positional] = ()
    """Which ones; all of the CPU's (scan, model, memory) without it."""
    threads: int | None = None
    """CPU threads; by default as many as torch takes."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run the command."""
    if argv and argv[0] == "curve":
        from samba_lm.cli import bench_curve

        bench_curve.main(argv[1:])
        return
    if argv and argv[0] in ("decode", "paper"):
        from samba_lm.cli import bench_paper

        bench_paper.main(argv)
        return
    if argv and argv[0] == "scale":
        from samba_lm.cli import bench_scale

        bench_scale.main(argv[1:])
        return
    if argv and argv[0] == "serve":
        from samba_lm.cli import bench_serve

        bench_serve.main(argv[1:])
        return
    if argv and argv[0] in ON_GPU:
        from samba_lm.cli import bench_gpu

        bench_gpu.main(argv)
        return
    args = parse(Bench, argv, prog="samba-lm bench")
    for what in args.what:
        if what in ON_GPU:
            raise UserError(
                f"`{what}` is measured on a GPU, alone and with options of its own: `samba-lm bench {what}`."
            )
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise UserError(f"--threads {args.threads} must be from 1 to {MAX_THREADS}.")
    chosen = tuple(dict.fromkeys(args.what or ON_CPU))
    if "model" in chosen:
        from samba_lm.bench.language_model import check_transformers

        check_transformers()  # before the others are measured for a minute
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    figures: dict[str, list[Figure]] = {}
    for what in chosen:
        with console.status(f"measuring {what}"):
            figures[what] = _runners()[what]()
        console.print(figures_table(figures[what]))
    if args.json is not None:
        record = {what: [f.record() for f in found] for what, found in figures.items()}
        write_json(args.json, {"device": "cpu", "figures": record})


def _runners() -> dict[str, Callable[[], list[Figure]]]:
    from samba_lm.bench.language_model import run_language_model
    from samba_lm.bench.memory import run_memory
    from samba_lm.bench.scan import run_scan

    return {"scan": run_scan, "model": run_language_model, "memory": run_memory}
