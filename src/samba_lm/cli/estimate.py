"""``samba-lm estimate RECIPE``: memory, time and GPU hours of a training run, before it is begun."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from samba_lm import zoo
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.cli.train import find_recipe, recipe_name
from samba_lm.config import ModelConfig
from samba_lm.errors import UserError
from samba_lm.train.estimate import GIB, GPUS, Choice, Estimate, Layout, arrange, estimate
from samba_lm.train.estimate.layout import NODE
from samba_lm.train.progress import count, duration
from samba_lm.train.recipe import ModelSection, Recipe

PROG = "samba-lm estimate"
MAX_GPUS = 100_000

DESCRIPTION = """Say what training as RECIPE says takes: memory of each GPU, time, GPU hours; and which rows at once,
activation checkpointing and [parallel] fit. RECIPE, and the options that replace its values, are those of `samba-lm
train`. Nothing is trained, and nothing is read but the recipe."""


@dataclass(frozen=True)
class EstimateCommand:
    """What follows the recipe's name."""

    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = field(default_factory=Recipe)
    gpus: int | None = None
    """How many GPUs; none: what the recipe's [parallel] says, else 1."""
    gpu: Literal["h100", "h200", "a100", "4090"] = "h100"
    """Which ones."""
    tokens_per_s_per_gpu: float | None = None
    """What you have measured there; none: what we have measured, else a share of the GPU's peak."""
    efficiency: float | None = None
    """Speed of a GPU among the others over its speed alone, to 1; none: what was measured on two (0.936), of more what
    is assumed (0.92 within a machine, else 0.85), where GPUs share rows 0.785, as two do (0.725 between machines)."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run the command."""
    name, options = recipe_name(argv, PROG)
    default = EstimateCommand(Recipe() if name is None else Recipe.from_toml(find_recipe(name)))
    try:
        args = parse(
            EstimateCommand, options, prog=f"{PROG} {name or 'RECIPE'}", description=DESCRIPTION, default=default
        )
    except UserError as error:
        # The name of our own field is no part of what the user wrote.
        raise UserError(str(error).removeprefix("recipe.")) from None
    _check(args)
    recipe = args.recipe
    config, remark = model_config(recipe.model)
    section = recipe.parallel
    gpus = args.gpus or section.replicate * section.context * (1 if section.shard == "auto" else section.shard)
    found = estimate(
        config,
        recipe.train,
        arrange(section, gpus),
        GPUS[args.gpu],
        tokens_per_s=args.tokens_per_s_per_gpu,
        efficiency=args.efficiency,
    )
    console = Console()
    _show(console, found, config, recipe)
    if remark:
        console.print(remark, highlight=False)
    if recipe.lora.rank:
        console.print(
            "Adapters are trained and the weights are not: gradients and optimizer take far less than said.",
            highlight=False,
        )
    if found.advised is not None and name is not None:
        console.print("\nTo train so:", highlight=False)
        console.print(command(name, recipe, *found.advised), soft_wrap=True, highlight=False, markup=False)
    if args.json is not None:
        write_json(args.json, {"recipe": recipe.to_dict(), "parameters": config.parameters(), **found.record()})


def _check(args: EstimateCommand) -> None:
    if args.gpus is not None and not 1 <= args.gpus <= MAX_GPUS:
        raise UserError(f"--gpus {args.gpus} must be from 1 to {MAX_GPUS}.")
    if args.tokens_per_s_per_gpu is not None and args.efficiency is not None:
        raise UserError(
            "--tokens-per-s-per-gpu is of a GPU among the others, so --efficiency says nothing beside it: give one."
        )
    for option, value, most in (
        ("--tokens-per-s-per-gpu", args.tokens_per_s_per_gpu, 1e12),
        ("--efficiency", args.efficiency, 1.0),
    ):
        if value is not None and not 0 < value <= most:
            raise UserError(f"{option} {value:g} must be above 0 and at most {most:g}.")


def model_config(section: ModelSection) -> tuple[ModelConfig, str | None]:
    """The model that a recipe trains, and what is to be said of it; the data, which decides an "auto" vocabulary, is
    not read. Raises UserError for unknown names, and for init_from without a checkpoint there."""
    if section.init_from is None:
        own = zoo.get(section.name).vocab_size
        remark = f"Vocabulary: taken as {own:,}; the data decides." if section.vocab_size == "auto" else None
        return section.config(own), remark
    from samba_lm import checkpoint

    folder = checkpoint.find(section.init_from)
    if folder is None:
        raise UserError(
            f"model.init_from = {section.init_from!r} is no checkpoint's folder, nor a trained model that comes along; "
            "give one that is here, or --model.init-from None --model.name with a model of its size."
        )
    return checkpoint.read_config(folder)[0], None


def _show(console: Console, found: Estimate, config: ModelConfig, recipe: Recipe) -> None:
    layout, train = found.layout, recipe.train
    parts = [("replicate", layout.replicate), ("shard", layout.shard), ("context", layout.context)]
    shape = " x ".join(f"{name} {number}" for name, number in parts if number > 1)
    console.print(
        f"{config.name}, {count(config.parameters())} parameters, on {layout.gpus} x {found.gpu.title}"
        + (f" ({shape})" if shape else ""),
        highlight=False,
    )
    console.print(
        f"{train.batch_size} x {train.length:,} tokens a step, {found.micro_batch} rows at once on each GPU, "
        f"activation checkpointing {train.activation_checkpointing}\n",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for part, number in found.memory.record().items():
        if number:
            table.add_row(part, size(number))
    table.add_row("at the peak", size(found.memory.total), style="bold")
    console.print(table)
    usable = f"{found.gpu.usable / GIB:.1f} GiB that tensors can have of {found.gpu.memory / GIB:.1f}"
    console.print(f"{'It fits' if found.fits else 'It does NOT fit'} the {usable}.\n", highlight=False)

    speed = found.speed
    console.print(
        f"{count(speed.each)} tokens/s a GPU (MFU {speed.mfu:.0%}), {count(speed.all)} in all. {speed.basis}",
        highlight=False,
    )
    console.print(
        f"{count(found.tokens)} tokens, {train.total_steps:,} steps: {long(found.seconds)}, "
        f"{found.gpu_hours:,.0f} GPU hours, validation and checkpoints not counted.\n",
        highlight=False,
    )
    fits = ", ".join(f"{each.activation_checkpointing} {each.micro_batch or 'not one'}" for each in found.choices)
    console.print(f"Most rows at once by activation checkpointing: {fits}.", highlight=False)
    if found.advised is None:
        console.print(
            f"Nothing tried fits {layout.gpus} x {found.gpu.title}: take more or larger GPUs (--gpus, --gpu), or "
            "shorter rows (--train.length).",
            highlight=False,
        )


def size(number: int) -> str:
    """Bytes in GiB, small ones in MiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"


def long(seconds: float) -> str:
    """A duration, years where it takes some."""
    years = seconds / (365.25 * 86400)
    return f"{years:.1f} years" if years >= 2 else duration(seconds)


def command(name: str, recipe: Recipe, layout: Layout, choice: Choice) -> str:
    """The line that trains as ``recipe``, with this layout and choice in place of its own."""
    whole = choice.micro_batch == recipe.train.batch_size and recipe.train.micro_batch is None
    sections = {
        "train": recipe.train.model_copy(
            update={
                "micro_batch": None if whole else choice.micro_batch,
                "activation_checkpointing": choice.activation_checkpointing,
            }
        ),
        "parallel": recipe.parallel.model_copy(
            update={"replicate": layout.replicate, "shard": "auto", "context": layout.context}
        ),
    }
    changed = recipe.model_copy(update=sections).differences(Recipe.from_toml(find_recipe(name)).to_dict())
    start = "samba-lm train"
    if layout.gpus > 1:
        nodes = -(-layout.gpus // NODE)
        several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if nodes > 1 else ""
        start = f"torchrun {several}--nproc-per-node {min(layout.gpus, NODE)} -m samba_lm train"
    return " ".join([start, shlex.quote(name), *(_option(key, value) for key, (value, _) in changed.items())])


def _option(key: str, value: object) -> str:
    section, _, name = key.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{section}.{name}" if value else f"--{section}.no-{name}"
    words = value if isinstance(value, list) else [value]
    return " ".join([f"--{section}.{name}", *(shlex.quote(str(word)) for word in words)])
