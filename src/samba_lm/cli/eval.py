"""What the `eval` commands have in common: their options, checkpoints one after the other, progress."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tyro.conf import Positional

from samba_lm import shipped
from samba_lm.cli.output import JsonFile, check_different, figure_file, output_file
from samba_lm.cli.parse import several
from samba_lm.cli.results import Model
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

SHIFTS = {"": 0, "K": 10, "M": 20}
"""What the letters behind a length mean: 4K are 4096."""


def _lengths(words: list[str]) -> tuple[int, ...]:
    parts = [re.fullmatch(r" *([0-9]{1,15})([KkMm]?) *", part) for part in words[0].split(",")]
    if None in parts:
        raise UserError(f"--lengths = {words[0]}: expected whole numbers with commas between, such as 512,4096,64K,1M.")
    return tuple(int(part[1]) << SHIFTS[part[2].upper()] for part in parts if part is not None)


Lengths = Annotated[tuple[int, ...], several("INT,INT,...", _lengths)]
Checkpoints = Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="CKPT ...")]]


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    json: JsonFile = None
    """Write all that was measured to this file. What an earlier run left there is kept, and not measured again."""
    csv: Path | None = None
    """Write a table of it to this file."""
    figure: Path | None = None
    """Draw the results: a PNG, SVG or PDF file, as its name ends."""

    def check(self) -> None:
        """Raise UserError where a file cannot be written."""
        if self.csv is not None:
            output_file(self.csv, "--csv", "results.csv")
        if self.figure is not None:
            figure_file(self.figure, "results.png")
        check_different({"--json": self.json, "--csv": self.csv, "--figure": self.figure})


OutputOptions = Annotated[Output, tyro.conf.arg(name="")]
"""Among a command's other options, as if they were its own."""


def check_checkpoints(names: Sequence[str], *, tokenizer: bool = True) -> None:
    """Raise UserError for no checkpoint at all, or one that is none, or (``tokenizer``) that reads no text: before
    another is measured."""
    from samba_lm import checkpoint, zoo

    if not names:
        raise UserError("Which checkpoint? Give one or more folders first, or samba-nano, the model that comes along.")
    for name in names:
        folder = resolved(name)
        if not folder.is_dir() and name not in zoo.names():
            checkpoint.load(name)  # it says what is wrong
        if not folder.is_dir():
            continue
        told = checkpoint.read_config(folder)
        if tokenizer and checkpoint.read_tokenizer(folder, *told) is None:
            raise UserError(f"{name} has no tokenizer, so it can neither read nor write text: put its tokenizer there.")


def resolved(folder_or_name: str) -> Path:
    """The folder with the weights: a run's is its newest step."""
    from samba_lm import checkpoint

    return checkpoint.find(folder_or_name) or Path(folder_or_name)


def about(name: str, model: SambaLM, tokenizer: Tokenizer | None, adapter: Path | None = None) -> Model:
    """The facts of a model that was loaded by this name, with this adapter added to its weights."""
    from samba_lm.convert.peft import adapter_sha256

    folder = resolved(name)
    return {
        "name": name,
        "checkpoint": name if shipped.find(name) else str(folder),
        "weights_sha256": _weights_sha256(folder) if folder.is_dir() else None,
        "adapter": None if adapter is None else str(adapter),
        "adapter_sha256": None if adapter is None else adapter_sha256(adapter),
        "config": model.config.fingerprint(),
        "model": model.config.to_dict(),
        "parameters": model.config.parameters(),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantized": model.quantized,
    }


def _weights_sha256(folder: Path) -> str:
    """Of the file with a checkpoint's weights; of several files, the hash of their hashes."""
    from samba_lm import checkpoint
    from samba_lm.tensor_files import sha256

    found = [sha256(path) for path in checkpoint.weight_files(folder)]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def label(name: str, among: Sequence[str]) -> str:
    """The shortest name that tells a checkpoint from the others."""
    last = Path(name).name
    return last if sum(Path(other).name == last for other in among) == 1 else name


@contextmanager
def progress(name: str) -> Iterator[Callable[[float], None]]:
    """Yield a function to be told of the share that is done; draws a bar on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def measuring(name: str) -> Iterator[Callable[[float], None]]:
    """:func:`progress` of a checkpoint's work, whose errors tell which of several it was."""
    with progress(name) as tell:
        try:
            yield tell
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
