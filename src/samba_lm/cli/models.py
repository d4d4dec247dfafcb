"""``samba-lm models``: the zoo as a table, or one model's stack drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from samba_lm import zoo
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.config import LayerSpec, ModelConfig
from samba_lm.errors import UserError
from samba_lm.train.progress import count

MAX_CONTEXT = 10**12


@dataclass(frozen=True)
class Models:
    """List the named architectures with their sizes, or draw the stack of one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """The model to draw; all are listed without it."""
    context: int = 4096
    """Sequence length in tokens for the FLOPs a token and for the state of models with full attention."""
    json: JsonFile = None
    """Also write the figures to this file."""


def main(argv: list[str]) -> None:
    """Run the command."""
    args = parse(Models, argv, prog="samba-lm models")
    names = zoo.names() if args.name is None else [args.name]
    if not 1 <= args.context <= MAX_CONTEXT:
        shown = args.context if abs(args.context) < 10**30 else "with so many digits"
        raise UserError(f"--context {shown} must be from 1 to {MAX_CONTEXT} tokens.")
    configs = [zoo.get(name) for name in names]
    console = Console()
    if args.name is None:
        _list(console, configs, args.context)
    else:
        _draw(console, configs[0], args.context)
    if args.json is not None:
        rows = [facts(config, args.context) for config in configs]
        write_json(args.json, {"context": args.context, "models": rows})


def facts(config: ModelConfig, context: int) -> dict[str, Any]:
    """The figures of one model; bytes of state with bf16 activations."""
    return {
        "name": config.name,
        "paper": zoo.ZOO[config.name].paper,
        "parameters": config.parameters(),
        "layers": len(config.layers),
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "flops_per_token": config.flops_per_token(context),
        "state_bytes": config.state_bytes(context),
        "constant_state": config.constant_state,
    }


def _list(console: Console, configs: list[ModelConfig], context: int) -> None:
    wide = console.width >= 78  # a narrow terminal keeps what tells models apart
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    if wide:
        table.add_column("paper")
    for column in ("params", "layers", "FLOPs/token", "state")[: None if wide else 1]:
        table.add_column(column, justify="right", no_wrap=True)
    for config in configs:
        row = facts(config, context)
        size, flops = count(row["parameters"]), count(row["flops_per_token"], "KMGT")
        if wide:
            table.add_row(row["name"], row["paper"], size, str(row["layers"]), flops, _state(config, context))
        else:
            table.add_row(row["name"], size)
    console.print(table)
    console.print(
        f"FLOPs: forward, mean over {context} tokens. State: bytes a sequence, activations in bf16 and sums in fp32; "
        f"+ grows with the text (given at {context} tokens). `samba-lm models NAME` draws one."
    )


def _draw(console: Console, config: ModelConfig, context: int) -> None:
    row = facts(config, context)
    console.print(f"[bold]{config.name}[/bold]  ({row['paper']})", highlight=False)
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
