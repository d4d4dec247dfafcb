"""``samba-lm bench decode`` and ``bench paper``: generating on a GPU, and the paper's two figures of speed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from samba_lm.cli.bench_session import Session, within
from samba_lm.cli.bench_table import compared_table, figures_table, grid_table, kernels_table
from samba_lm.cli.model import Quantize
from samba_lm.cli.output import JsonFile, figure_file
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.bench.figure import Figure
    from samba_lm.bench.paper import Curves, Plan


@dataclass(frozen=True)
class Decode:
    """Time what a server does on a CUDA GPU, in bf16 with random weights, by the engine's own parts: steps of 16, 8, 4,
    2 and 1 texts, whether they cost the same after 4K and after 1M tokens, a prompt of 131,072 tokens, and a context
    from its file to the first token."""

    model: Annotated[str, tyro.conf.Positional] = "samba-1.7b"
    """Architecture from the zoo, without full attention."""
    tokens: int = 131_072
    """Length of the prompt."""
    contexts: tuple[int, ...] = (4096, 16_384, 65_536, 262_144, 1_048_576)
    """Lengths of text at which steps are compared, rising."""
    steps: int = 40
    """Timed steps of each kind, after some to warm up; the median counts."""
    quantize: Quantize | None = None
    """With such weights; the bars are those of bf16 and are left out."""
    profile: bool = False
    """Also profile one step of 16 texts: a table of its kernels, by time."""
    json: JsonFile = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Paper:
    """Measure the paper's two figures of speed on a CUDA GPU, in bf16 with random weights: reading prompts of 1K, 2K ..
    128K tokens, 128K in all, and generating 16 texts of up to 64K tokens. Times of steps are measured after 1K, 2K ..
    64K tokens, whose keys and values are random numbers, and added up."""

    models: tuple[str, ...] = ("samba-1.7b", "llama3-1.6b", "mistral-1.6b", "mamba-1.8b", "self-extend-llama3-1.6b")
    """Architectures from the zoo, measured in this order."""
    tokens: int = 131_072
    """Tokens of all prompts together, and the longest prompt: a power of two."""
    generated: int = 65_536
    """Tokens of the longest text generated: a power of two."""
    repeats: int = 3
    """Readings of each length of prompt; the median counts."""
    steps: int = 16
    """Timed steps at each length of text; the median counts."""
    at_once: tuple[int, ...] = (131_072,)
    """Prompt tokens that a model is given at once. Of several numbers each model takes the fastest at each length; half
    as many where memory does not allow it."""
    seconds: float = 420.0
    """After so long no further model is begun, nor a length that would not end in time."""
    full_run: bool = False
    """Also generate with samba-1.7b from the first token to the last, some two minutes, and compare the time with the
    sum of the steps' times."""
    figure: Path | None = None
    """Draw both figures: a PNG, SVG or PDF file, as its name ends."""
    json: JsonFile = None
    """Also write the figures to this file, after each model."""
    resume: bool = False
    """Keep the models that the --json file has whole, from such a GPU with these versions and options."""


def main(argv: list[str]) -> None:
    """Run the command named by the first word; exit code 1 where a figure could not be measured."""
    {"decode": _decode, "paper": _paper}[argv[0]](argv[1:])


def _decode(argv: list[str]) -> None:
    args = parse(Decode, argv, prog="samba-lm bench decode")
    within("tokens", args.tokens, 16, 1 << 24)
    within("steps", args.steps, 2, 10_000)
    for context in args.contexts:
        within("contexts", context, 1, 1 << 40)
    if len(args.contexts) < 2 or list(args.contexts) != sorted(set(args.contexts)):
        raise UserError("--contexts must be two numbers or more, rising, such as 4096 1048576.")
    from samba_lm import zoo

    config = zoo.get(args.model)
    if not config.constant_state:
        raise UserError(
            f"{args.model} has full attention, whose steps cost more with every token: see `samba-lm bench paper`."
        )
    session = Session("samba-lm bench decode", args.json)
    from samba_lm.bench.decode import run_decode

    session.clock.close()
    with session.progress() as report:
        figures, kernels = run_decode(
            args.model,
            session.ceilings,
            session.device,
            tokens=args.tokens,
            contexts=args.contexts,
            steps=args.steps,
            quantized=args.quantize,
            profile=args.profile,
            report=report,
        )
    session.console.print(compared_table(figures))
    if kernels:
        session.kernels[args.model] = kernels
        session.console.print(kernels_table(kernels))
    session.finish({"decode": figures})


def _paper(argv: list[str]) -> None:
    args = parse(Paper, argv, prog="samba-lm bench paper")
    within("repeats", args.repeats, 1, 1000)
    within("steps", args.steps, 2, 1000)
    within("seconds", args.seconds, 0, 86_400)
    for size in args.at_once:
        within("at-once", size, 1, 1 << 24)
    for name in ("tokens", "generated"):
        within(name, getattr(args, name), 1024, 1 << 24)
    if not args.at_once or not args.models:
        raise UserError("--models and --at-once need a value each at least.")
    if args.figure is not None:
        figure_file(args.figure, "speed.png")
    if args.resume and args.json is None:
        raise UserError("--resume goes on from what --json FILE has: give that too.")
    from samba_lm import zoo

    names = list(dict.fromkeys(args.models))
    for name in names:
        zoo.get(name)
    from samba_lm.bench import claims
    from samba_lm.bench.figure import Figure
    from samba_lm.bench.gpu import NotMeasured, attempt
    from samba_lm.bench.paper import SAMBA, Plan, generate, measure
    from samba_lm.bench.paper_figure import write_figure

    plan = Plan(args.tokens, args.generated, repeats=args.repeats, steps=args.steps, at_once=args.at_once)
    began = time.perf_counter()
    session = Session("samba-lm bench paper", args.json)
    session.clock.close()
    session.more["plan"] = asdict(plan)
    known = _known(args.json, session, plan) if args.resume and args.json is not None else {}
    session.more["kept"] = list(known)
    found: list[Curves] = []
    run: dict[int, float] | None = None

    def figures() -> list[Figure]:
        rows = [row for curves in found for row in claims.curve_figures(curves, plan)]
        return rows + claims.conclusions(found, plan, session.ceilings.copy, run)

    def save(rows: list[Figure]) -> None:
        session.more["models"] = {curves.name: curves.record() for curves in found}
        session.save({"paper": rows})

    with session.progress() as report:
        for name in dict.fromkeys((*names, *known)):
            found.append(known.get(name) or measure(name, plan, session.device, began + args.seconds, report))
            save(figures())
        failed = []
        if args.full_run:
            try:
                run = attempt(lambda: generate(SAMBA, plan, session.device, report))
            except NotMeasured as failure:
                failed = [Figure(f"{SAMBA}, one run", None, "thousand tokens/s", note=str(failure))]
    if args.figure is not None:
        write_figure(args.figure, found, plan, str(session.environment["device"]))
    _print(session, found, plan)
    rest = claims.conclusions(found, plan, session.ceilings.copy, run) + failed
    session.console.print(figures_table(rest))
    session.finish({"paper": figures() + failed})


def _print(session: Session, found: list[Curves], plan: Plan) -> None:
    """Both figures' numbers, a row for each model."""
    from samba_lm.bench.claims import generation_speed, prompt_speed

    for title, columns, rows in (
        ("Reading prompts, thousand tokens/s", plan.lengths, {c.name: prompt_speed(c, plan) for c in found}),
        (
            f"Generating {plan.batch} texts, thousand tokens/s, average from the first token on",
            plan.contexts,
            {c.name: generation_speed(c, plan) for c in found},
        ),
        (f"The last step of {plan.batch} texts, ms", plan.contexts, {c.name: c.steps for c in found}),
    ):
        session.console.print(f"[bold]{title}[/bold]", highlight=False)
        session.console.print(grid_table(columns, rows))
    for curves in found:
        if curves.plain:
            told = f"{curves.name}: steps by model.step, not by the kernels for steps: {curves.plain}"
            session.console.print(told, highlight=False, markup=False)


def _known(file: Path, session: Session, plan: Plan) -> dict[str, Curves]:
    """The models that an earlier run has measured whole, on such a device with such options and versions.

    Raises UserError for a file that is none of ours.
    """
    from samba_lm.bench.paper import Curves
    from samba_lm.cli.output import provenance

    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text())
        found = [Curves.from_record(curves) for curves in record["models"].values()]
        now = {**provenance(), **session.environment, "plan": json.loads(json.dumps(asdict(plan)))}
        same = ("device", "driver", "torch", "packages", "commit", "plan")
        differs = [key for key in same if record.get(key) != now.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--resume: {file} was not written by `samba-lm bench paper`: give another --json.") from None
    if differs:
        session.console.print(f"Measured again: {file} differs in {', '.join(differs)}.", highlight=False)
        return {}
    return {curves.name: curves for curves in found if curves.whole}
