"""``samba-lm train RECIPE``: train a model, or continue a run that was stopped."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError, did_you_mean
from samba_lm.train.recipe import MAX_NAME_BYTES, Recipe

PROG = "samba-lm train"
FOLDER = Path(__file__).with_name("recipes")
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
"""The recipes that come with samba-lm, by name."""
COLLECTED = {
    f"{path.parent.name}/{path.stem}": path
    for path in sorted(FOLDER.glob("*/*.toml"))
    if path.stem != "study" and not path.stem.startswith("base")
}
"""Those in folders, by folder and name: paper/samba-1.3b."""

DESCRIPTION = f"""Train as RECIPE says: a TOML file, or the name of one that comes with samba-lm ({", ".join(RECIPES)};
paper/NAME is any row of the paper's tables, such as paper/samba-1.3b; finetune/chat and finetune/lora learn from
conversations). Options replace single values of it. What it trains on instead of data.train stands in it (data.mixture,
data.chat, data.passkey or data.phonebook, such as passkey = {{}} under [data]); then they have options too.

A run that was stopped, however that was, continues with the same command, bit for bit."""


class PipeConsole(Console):
    """A console that remembers that the reader of its output went away, instead of ending the process there."""

    reader_gone = False

    def on_broken_pipe(self) -> None:
        self.reader_gone = True


@dataclass(frozen=True)
class TrainCommand:
    """What follows the recipe's name."""

    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = field(default_factory=Recipe)
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start over: a run found in train.out is moved aside first."""
    resume: Annotated[str, tyro.conf.arg(metavar="auto|PATH")] = "auto"
    """Where to go on. auto: the newest whole checkpoint in train.out, or the beginning where there is none; or a step's
    folder, of this run or of another one (then give a new train.out)."""
    json: JsonFile = None
    """Write the result to this file."""


def main(argv: list[str]) -> None:
    """Run the command.

    Exits with 128 + the signal when Ctrl-C, SIGTERM or SIGHUP ended the run early (saved, and continuable), and raises
    BrokenPipeError, after saving too, when the reader of the output went away.
    """
    name, options = recipe_name(argv)
    default = TrainCommand(Recipe() if name is None else Recipe.from_toml(find_recipe(name)))
    try:
        command = parse(
            TrainCommand, options, prog=f"{PROG} {name or 'RECIPE'}", description=DESCRIPTION, default=default
        )
    except UserError as error:
        # The name of our own field is no part of what the user wrote.
        raise UserError(str(error).removeprefix("recipe.")) from None
    # Only now: --help and a wrong recipe should not wait for torch.
    from samba_lm.train.parallel import started_rank
    from samba_lm.train.progress import duration, progress_observer
    from samba_lm.train.run import train

    # torchrun begins anew with the same words after a failure; what they began once is gone on from then.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    console = PipeConsole(quiet=started_rank() > 0)
    result = train(
        command.recipe,
        observer=progress_observer(console, command.recipe.train.log_every),
        fresh=command.fresh and not restarted,
        resume=None if restarted else _resume(command.resume),
        stop=lambda: console.reader_gone,
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
    if command.json is not None and started_rank() == 0:
        write_json(command.json, {**asdict(result), "recipe": command.recipe.to_dict()})
    if result.interrupted is not None:
        again = shlex.join([*_starter(), *_without_beginning(argv)])
        console.print(f"Stopped early. To go on: {again}", soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(128 + result.interrupted)
    if console.reader_gone:
        raise BrokenPipeError


def _resume(word: str) -> Path | None:
    if word in ("never", "none", ""):
        raise UserError(
            f"--resume {word or repr(word)}: to start over there is --fresh; otherwise give auto or a folder."
        )
    return None if word == "auto" else Path(word)


def _without_beginning(argv: list[str]) -> list[str]:
    """The words without --fresh and --resume, which would begin at the same place again."""
    words = [word for word in argv if word != "--fresh" and not word.startswith("--resume=")]
    if "--resume" in words:
        at = words.index("--resume")
        del words[at : at + 2]
    return words


def _starter() -> list[str]:
    """The words before the recipe's name that start such processes as these."""
    here, world = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if world == "1":
        return PROG.split()
    machines = [] if here == world else ["--nnodes", str(int(world) // int(here))]
    return ["torchrun", *machines, "--nproc-per-node", here, "-m", "samba_lm", "train"]


def find_recipe(name: str) -> Path:
    """The recipe's file: ``name`` is its path, or one of :data:`RECIPES` or :data:`COLLECTED`; a file of one's own
    comes first.

    Raises UserError for a name that is neither. (Whether a path leads to a recipe shows when it is read.)
    """
    path = Path(name)
    if not name or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise UserError(f"A recipe cannot be named {name[:40]!r}: the name is {'too long' if name else 'empty'}.")
    if path.is_file() or path.suffix == ".toml":
        return path
    if name in COLLECTED:
        return COLLECTED[name]
    beside = [other for other in COLLECTED if other.startswith(f"{path.parent}/")]
    if beside and not path.parent.is_dir():
        raise UserError(f"No recipe {name!r}.{did_you_mean(name, beside)}")
    file = Path(f"{path}.toml")
    if name not in RECIPES and len(os.fsencode(file.name)) <= MAX_NAME_BYTES and file.is_file():
        raise UserError(f"No recipe {name!r}. Did you mean {str(file)!r}?")
    if path.name != name:
        return path
    if name not in RECIPES:
        collected = next((other for other in COLLECTED if other.endswith(f"/{name}")), None)
        near = f" Did you mean {collected!r}?" if collected else did_you_mean(name, RECIPES)
        hint = near if "mean" in near else ""  # the others are listed anyway
        raise UserError(f"No recipe {name!r}.{hint} Give a TOML file, or one of {', '.join(RECIPES)}, paper/NAME.")
    return RECIPES[name]


def recipe_name(argv: list[str], prog: str = PROG) -> tuple[str | None, list[str]]:
    """The recipe's path or name and the options after it; none only where help is asked for."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if "-h" in argv or "--help" in argv:
        return None, ["--help"]
    raise UserError(f"Which recipe? Give a TOML file, or one of {', '.join(RECIPES)}, first: {prog} RECIPE [OPTIONS].")
