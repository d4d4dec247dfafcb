"""``samba-lm bench curve DATA``: the loss curve of one training run on the CPU and on a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from samba_lm.cli.bench_session import WIDE
from samba_lm.cli.bench_table import figures_table
from samba_lm.cli.output import JsonFile, figure_file, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.bench.curve import Curve as Losses
    from samba_lm.bench.curve import Run
    from samba_lm.bench.figure import Figure

MAX_THREADS = 1024
REPORT_EVERY = 50


@dataclass(frozen=True)
class Curve:
    """Train one small model on the CPU in fp32 and on a CUDA GPU in fp32 and in bf16 (on fp32 weights), from the same
    initial weights on the same batches, and compare the losses step by step. Noise is what a bf16 run without our
    kernels is from the CPU.

    The two parts may run on different machines: `--path cpu --weights W --json A` on one, then, with the same options,
    `--path gpu --against A --weights W` on the other."""

    data: tyro.conf.Positional[Path]
    """Folder of token shards, as written by `samba-lm data prepare`."""
    path: Literal["cpu", "gpu", "both"] = "both"
    """Which part to run."""
    against: Path | None = None
    """The JSON file of the CPU part, for `--path gpu`."""
    weights: Path | None = None
    """Checkpoint folder of the initial weights: read if it is there, else drawn from the seed and written."""
    model: str = "samba-421m"
    """Architecture from the zoo, made smaller by the next five."""
    layers: int = 8
    """Layers kept, the first ones."""
    d_model: int = 256
    """Width."""
    head_dim: int = 64
    """Width of an attention head."""
    mlp: int = 688
    """Width of the MLPs."""
    window: int = 256
    """Window of sliding attention."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 8
    """Sequences a step."""
    length: int = 1024
    """Tokens a sequence."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate climbs to its peak."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    threads: Annotated[int | None, tyro.conf.arg(name="threads")] = None
    """CPU threads; by default as many as torch takes."""
    figure: Path | None = None
    """Draw the curves and their differences: a PNG, SVG or PDF file, as its name ends."""
    json: JsonFile = None
    """Write losses, hashes and figures to this file, also what is known after each run."""


def main(argv: list[str]) -> None:
    """Run the command; exit code 1 where a run failed or a curve is further off than noise."""
    args = parse(Curve, argv, prog="samba-lm bench curve")
    _check(args)
    import torch

    from samba_lm.bench.environment import environment
    from samba_lm.bench.gpu import require_gpu

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    gpu = None if args.path == "cpu" else require_gpu("samba-lm bench curve")
    from samba_lm.bench.curve import WAYS, read_curves, record, run_curve

    run = _run(args)
    known, origin = read_curves(args.against, run) if args.against is not None else ({}, None)
    facts = {} if gpu is None else environment(gpu)
    if origin is not None:
        facts["against"] = origin
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    identity = run.identity()
    config = run.model.config
    console.print(
        f"{config.name}: {config.parameters():,} parameters, {args.steps} steps of {args.batch} x {args.length}; "
        f"initial weights {str(identity['weights'])[:12]}, batches {str(identity['batches'])[:12]}",
        highlight=False,
    )

    def save(curves: dict[str, Losses], figures: list[Figure] | None = None) -> None:
        if args.json is not None:
            write_json(args.json, {**facts, **record(run, curves, figures or [])})

    def report(name: str, step: int, loss: float) -> None:
        if step == 1 or step % REPORT_EVERY == 0:
            print(f"{name}: step {step}, loss {loss:.5f}", file=sys.stderr, flush=True)

    names = [name for name, way in WAYS.items() if args.path == "both" or way.on_gpu == (args.path == "gpu")]
    curves, figures = run_curve(run, names, gpu, known, report=report, save=save)
    save(curves, figures)
    if args.figure is not None and curves:
        from samba_lm.bench.curve_figure import write_figure

        write_figure(args.figure, {name: curve.losses for name, curve in curves.items()})
    console.print(figures_table(figures))
    if failed := [figure for figure in figures if figure.failed]:
        names_told = "; ".join(f"{figure.name}{f': {figure.note}' if figure.note else ''}" for figure in failed)
        console.print(f"[bold]Failed[/bold]: {names_told}", highlight=False)
        raise SystemExit(1)


def _check(args: Curve) -> None:
    for name, value in (
        *(("layers", args.layers), ("d-model", args.d_model), ("head-dim", args.head_dim), ("mlp", args.mlp)),
        *(("window", args.window), ("steps", args.steps), ("batch", args.batch), ("length", args.length)),
    ):
        if not 1 <= value <= 1 << 24:
            raise UserError(f"--{name} {value} must be from 1 to {1 << 24}.")
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise UserError(f"--threads {args.threads} must be from 1 to {MAX_THREADS}.")
    if args.figure is not None:
        figure_file(args.figure, "curve.png")
    if args.path == "gpu" and args.against is None:
        raise UserError("--path gpu needs --against FILE: what `samba-lm bench curve --path cpu --json FILE` wrote.")
    if args.path != "gpu" and args.against is not None:
        raise UserError(f"--against is for --path gpu; --path {args.path} makes the CPU's curve itself.")


def _run(args: Curve) -> Run:
    from samba_lm import zoo
    from samba_lm.bench.curve import Run, cut, initial_model
    from samba_lm.data.loader import Loader
    from samba_lm.data.shards import TokenDataset
    from samba_lm.train.recipe import VOCAB_MULTIPLE, Recipe

    section = {
        "steps": args.steps,
        "batch_size": args.batch,
        "length": args.length,
        "lr": args.lr,
        "warmup_fraction": args.warmup,
        "seed": args.seed,
    }
    settings = Recipe.from_dict({"train": section}, source="Options").train
    dataset = TokenDataset.open(args.data)
    config = cut(
        zoo.get(args.model),
        layers=args.layers,
        d_model=args.d_model,
        head_dim=args.head_dim,
        mlp=args.mlp,
        window=args.window,
        vocab_size=-(-dataset.meta.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
    )
    loader = Loader(dataset, args.batch, args.length, args.seed)
    return Run(initial_model(config, args.seed, args.weights), loader, settings)
