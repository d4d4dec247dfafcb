"""``samba-lm models``: the zoo as a table, or one model's stack drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from samba_lm import shipped, zoo
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.config import LayerSpec, ModelConfig
from samba_lm.errors import UserError, did_you_mean
from samba_lm.files import read_json
from samba_lm.train.progress import count

MAX_CONTEXT = 10**12


@dataclass(frozen=True)
class Models:
    """List the named architectures with their sizes, or draw the stack of one. Names are also those of trained models
    that come with samba-lm."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """The model to draw; all are listed without it."""
    context: int = 4096
    """Sequence length in tokens for the FLOPs a token and for the state of models with full attention."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run the command."""
    args = parse(Models, argv, prog="samba-lm models")
    names = [*shipped.names(), *zoo.names()] if args.name is None else [args.name]
    if not 1 <= args.context <= MAX_CONTEXT:
        shown = args.context if abs(args.context) < 10**30 else "with so many digits"
        raise UserError(f"--context {shown} must be from 1 to {MAX_CONTEXT} tokens.")
    rows = [
        (facts(name, config, args.context), config) for name, config in zip(names, map(_config, names), strict=True)
    ]
    console = Console()
    if args.name is None:
        _list(console, rows, args.context)
    else:
        _draw(console, *rows[0], args.context)
    if args.json is not None:
        write_json(args.json, {"context": args.context, "models": [row for row, _ in rows]})


def _config(name: str) -> ModelConfig:
    if name not in shipped.names():
        if name not in zoo.ZOO:
            near = did_you_mean(name, [*zoo.names(), *shipped.names()])
            raise UserError(f"Unknown model {name!r}.{near} `samba-lm models` lists them all.")
        return zoo.get(name)
    header = read_json(shipped.FOLDER / name / "config.json")
    assert isinstance(header, dict), "what comes with the package is whole"
    return ModelConfig.from_dict(header["model"])


def facts(name: str, config: ModelConfig, context: int) -> dict[str, Any]:
    """The figures of one model; bytes of state with bf16 activations."""
    trained = name in shipped.names()
    return {
        "name": name,
        "paper": "trained" if trained else zoo.ZOO[name].paper,
        "trained": trained,
        "parameters": config.parameters(),
        "layers": len(config.layers),
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "flops_per_token": config.flops_per_token(context),
        "state_bytes": config.state_bytes(context),
        "constant_state": config.constant_state,
    }


def _list(console: Console, rows: list[tuple[dict[str, Any], ModelConfig]], context: int) -> None:
    wide = console.width >= 78  # a narrow terminal keeps what tells models apart
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    if wide:
        table.add_column("paper")
    for column in ("params", "layers", "FLOPs", "state")[: None if wide else 1]:
        table.add_column(column, justify="right", no_wrap=True)
    for row, config in rows:
        size, flops = count(row["parameters"]), count(row["flops_per_token"], "KMGT")
        if wide:
            table.add_row(row["name"], row["paper"], size, str(row["layers"]), flops, _state(config, context))
        else:
            table.add_row(row["name"], size)
    console.print(table)
    if shipped.DEFAULT in shipped.names():
        console.print(
            f"{shipped.DEFAULT} is trained and comes with samba-lm: what writes text takes it where no model is named."
        )
    console.print(
        f"FLOPs: a token, forward, mean over {context} tokens. State: bytes a sequence, activations in bf16 and sums "
        f"in fp32; + grows with the text (given at {context} tokens). `samba-lm models NAME` draws one."
    )


def _draw(console: Console, row: dict[str, Any], config: ModelConfig, context: int) -> None:
    origin = "trained, comes with samba-lm" if row["trained"] else row["paper"]
    console.print(f"[bold]{row['name']}[/bold]  ({origin})", highlight=False)
    console.print(
        f"{row['parameters']:,} parameters, {row['layers']} layers, width {config.d_model}; "
        f"{count(row['flops_per_token'], 'KMGT')} FLOPs a token at {context}; "
        f"state {_state(config, context)} a sequence\n",
        highlight=False,
    )
    tied = "tied to the head" if config.tie_embeddings else "head apart"
    console.print(f"  embedding   {config.vocab_size} x {config.d_model}, {tied}", highlight=False)
    pattern, repeat = repeating(config.layers)
    console.print(f"  ┌ x {repeat}" if repeat > 1 else "  ┌", highlight=False)
    for spec, repeats in _runs(pattern):
        times = f" (x {repeats})" if repeats > 1 else ""
        size = count(spec.parameters(config.d_model))
        console.print(f"  │ + {spec.kind:<11} {spec.describe()}  [dim]{size}{times}[/dim]", highlight=False)
    console.print("  └", highlight=False)
    console.print(f"  norm, head  RMSNorm, logits over {config.vocab_size}", highlight=False)
    if row["trained"]:
        card = shipped.FOLDER / row["name"] / "README.md"
        console.print(f"\n  its card: {card}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        "\n  +: x + layer(RMSNorm(x)); the last column counts a layer's parameters", highlight=False, style="dim"
    )


def repeating(layers: tuple[LayerSpec, ...]) -> tuple[tuple[LayerSpec, ...], int]:
    """The shortest pattern that the layers repeat, and how often."""
    for size in range(1, len(layers) + 1):
        if len(layers) % size == 0 and layers == layers[:size] * (len(layers) // size):
            return layers[:size], len(layers) // size
    raise AssertionError("the whole is a pattern of itself")


def _runs(layers: tuple[LayerSpec, ...]) -> list[tuple[LayerSpec, int]]:
    """Equal neighbours folded into one line with a count."""
    runs: list[tuple[LayerSpec, int]] = []
    for spec in layers:
        if runs and runs[-1][0] == spec:
            runs[-1] = (spec, runs[-1][1] + 1)
        else:
            runs.append((spec, 1))
    return runs


def _state(config: ModelConfig, context: int) -> str:
    return count(config.state_bytes(context), "KMGT") + ("B" if config.constant_state else "B +")
