"""``samba-lm train RECIPE.toml``: train a model, or continue a run that was stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from samba_lm.cli.output import write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError
from samba_lm.train.recipe import Recipe

PROG = "samba-lm train"


@dataclass(frozen=True)
class TrainCommand:
    """Train as RECIPE.toml says; options replace single values of it.

    A run that was stopped, however that was, continues with the same command, bit for bit.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start over: a run found in train.out is moved aside first."""
    json: Path | None = None
    """Write the result to this file."""


def main(argv: list[str]) -> None:
    """Run the command. Exits with 130 or 143 when Ctrl-C or SIGTERM ended the run early (saved, and continuable)."""
    path, options = _recipe_path(argv)
    default = TrainCommand(Recipe.from_toml(path) if path else Recipe())
    try:
        command = parse(TrainCommand, options, prog=f"{PROG} {path or 'RECIPE.toml'}", default=default)
    except UserError as error:
        # The name of our own field is no part of what the user wrote.
        raise UserError(str(error).removeprefix("recipe.")) from None
    # Only now: --help and a wrong recipe should not wait for torch.
    from samba_lm.train.progress import duration, progress_observer
    from samba_lm.train.run import train

    console = Console()
    result = train(
        command.recipe, observer=progress_observer(console, command.recipe.train.log_every), fresh=command.fresh
    )
    losses = f"loss {result.final_loss:.4f}" + (
        f", validation {result.val_loss:.4f}" if result.val_loss is not None else ""
    )
    work = f"{result.steps} steps, {result.tokens:,} tokens in {duration(result.seconds)}"
    console.print(
        f"{work}: {losses}. Model: {result.folder}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if command.json is not None:
        write_json(command.json, {**asdict(result), "recipe": command.recipe.to_dict()})
    if result.interrupted is not None:
        console.print(f"Stopped early. To go on: {PROG} {path} (with the same options).", soft_wrap=True, markup=False)
        raise SystemExit(128 + result.interrupted)


def _recipe_path(argv: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's path and the options after it; no path only where help is asked for."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if "-h" in argv or "--help" in argv:
        return None, ["--help"]
    raise UserError(f"Which recipe? Give a TOML file first: {PROG} RECIPE.toml [OPTIONS].")
