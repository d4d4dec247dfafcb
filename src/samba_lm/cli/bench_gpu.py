"""``samba-lm bench ops``, ``bench train`` and ``bench prefill``: the GPU's benchmarks and their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from samba_lm.cli.bench_session import Session, within
from samba_lm.cli.bench_table import compared_table, kernels_table
from samba_lm.cli.output import JsonFile
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.bench.figure import Figure

Operation = Literal["scan", "conv", "attention", "norm", "swiglu", "rope", "cross-entropy", "gla"]


@dataclass(frozen=True)
class Ops:
    """Time every operation's kernels on a CUDA GPU by CUDA events, beside the GPU's copy bandwidth and bf16 matrix
    product, and beside others' kernels where they are installed. Parity with fp64 comes first: outputs, states,
    gradients."""

    what: Annotated[tuple[Operation, ...], tyro.conf.Positional] = ()
    """Which operations; all without it."""
    repeats: int = 20
    """Timed calls of each, after some to warm up; the median counts."""
    peers: bool = True
    """Others' kernels too, where they are installed."""
    seconds: float = 140.0
    """After so long no further peer is begun."""
    json: JsonFile = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Train:
    """Time training steps on a CUDA GPU as the trainer takes them: bf16 compute, fp32 weights, AdamW, random tokens."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("samba-421m", "samba-1.3b")
    """Architectures from the zoo."""
    batch: int | None = None
    """Sequences a step; by default 16 for samba-421m, else 8."""
    length: int = 4096
    """Tokens a sequence."""
    micro_batch: tuple[int, ...] = ()
    """Sequences computed at once, one or several sizes to try; by default what the memory bar allows."""
    steps: int = 8
    """Timed steps, after some to warm up; the median counts."""
    float8: bool = False
    """Compute the large linear maps by float8 products."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    activation_checkpointing: Literal["none", "selective", "full"] | None = None
    """What backward computes again instead of keeping it: nothing, what is cheap, or each layer; by default what the
    memory bar asks for."""
    profile: bool = False
    """Also profile one step: a table of its kernels, by time."""
    json: JsonFile = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Prefill:
    """Time reading a long prompt on a CUDA GPU up to the logits of its last token, in bf16, as generation does it."""

    model: Annotated[str, tyro.conf.Positional] = "samba-1.7b"
    """Architecture from the zoo."""
    tokens: int = 131_072
    """Length of the prompt."""
    chunk: tuple[int, ...] = ()
    """Tokens read at once, one or several sizes to try; by default all, 8192 and 2048."""
    repeats: int = 5
    """Timed readings, after one to warm up; the median counts."""
    peers: bool = False
    """Also time transformers' Llama at the Llama-3 1.6B shape, which takes some five seconds a reading."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run the command named by the first word; exit code 1 where one of our own figures could not be measured."""
    command, words = argv[0], argv[1:]
    {"ops": _ops, "train": _train, "prefill": _prefill}[command](words)


def _ops(argv: list[str]) -> None:
    args = parse(Ops, argv, prog="samba-lm bench ops")
    within("repeats", args.repeats, 20, 10_000)
    within("seconds", args.seconds, 0, 86_400)
    session = Session("samba-lm bench ops", args.json)
    from samba_lm.bench.ops import OPERATIONS, run_ops
    from samba_lm.bench.peers import PEERS

    chosen = [OPERATIONS[name]() for name in dict.fromkeys(args.what or OPERATIONS)]
    with session.progress() as report:
        figures = run_ops(
            chosen,
            session.clock,
            session.ceilings,
            repeats=args.repeats,
            seconds=args.seconds,
            peers=PEERS if args.peers else (),
            report=report,
            save=lambda figures: session.save({"ops": figures}),
        )
    session.console.print(compared_table(figures))
    session.finish({"ops": figures})


def _train(argv: list[str]) -> None:
    args = parse(Train, argv, prog="samba-lm bench train")
    for name, value, low, high in (
        ("batch", args.batch, 1, 1 << 20),
        ("length", args.length, 1, 1 << 24),
        ("steps", args.steps, 8, 10_000),
        *(("micro-batch", size, 1, 1 << 20) for size in args.micro_batch),
    ):
        within(name, value, low, high)
    from samba_lm import zoo

    configs = [zoo.get(name) for name in dict.fromkeys(args.models)]  # a wrong name is told before any work
    from samba_lm.bench.bars import default_batch

    batches = [args.batch or default_batch(config.name) for config in configs]
    for batch in batches:
        for size in args.micro_batch:
            if batch % size:
                raise UserError(f"--micro-batch {size} does not divide a batch of {batch} sequences.")
    session = Session("samba-lm bench train", args.json)
    from samba_lm.bench.training import run_train
    from samba_lm.train.recipe import TrainSection

    settings = TrainSection(dtype="bfloat16", float8=args.float8, compile=args.compile)
    session.clock.close()
    figures: dict[str, list[Figure]] = {}
    for config, batch in zip(configs, batches, strict=True):
        with session.progress() as report:
            report(f"training {config.name}")
            figures[config.name], kernels = run_train(
                config.name,
                session.ceilings,
                session.device,
                batch=batch,
                length=args.length,
                micro_batches=tuple(dict.fromkeys(args.micro_batch)),
                steps=args.steps,
                settings=settings,
                activation_checkpointing=args.activation_checkpointing,
                profile=args.profile,
            )
        session.console.print(compared_table(figures[config.name]))
        if kernels:
            session.kernels[config.name] = kernels
            session.console.print(kernels_table(kernels))
        session.save(figures)
    session.finish(figures)


def _prefill(argv: list[str]) -> None:
    args = parse(Prefill, argv, prog="samba-lm bench prefill")
    within("tokens", args.tokens, 1, 1 << 24)
    within("repeats", args.repeats, 1, 1000)
    for size in args.chunk:
        within("chunk", size, 1, 1 << 24)
    from samba_lm import zoo

    zoo.get(args.model)
    session = Session("samba-lm bench prefill", args.json)
    from samba_lm.bench.prefill import run_prefill

    session.clock.close()
    with session.progress() as report:
        report(f"reading with {args.model}")
        figures = run_prefill(
            args.model,
            session.ceilings,
            session.device,
            tokens=args.tokens,
            chunks=tuple(dict.fromkeys(args.chunk)),
            repeats=args.repeats,
            peers=args.peers,
        )
    session.console.print(compared_table(figures))
    session.finish({"prefill": figures})
