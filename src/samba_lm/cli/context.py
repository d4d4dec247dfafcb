"""``samba-lm context``: read a text into a context's file, and look at such files."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from samba_lm import shipped
from samba_lm.cli.generate import file_share, open_stdin
from samba_lm.cli.model import ContextFile, Dtype, OptionalCheckpoint, Quantize, load_context, load_with_tokenizer
from samba_lm.cli.output import JsonFile, output_file, write_json
from samba_lm.cli.parse import parse
from samba_lm.contexts.file import check_replaceable
from samba_lm.contexts.info import Info, check_title, inspect, title_of
from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK
from samba_lm.train.progress import count


@dataclass(frozen=True)
class Save:
    """Read a text of any length, in constant memory, and write what the model remembers of it to a file.

    Going on from the file with `ask`, `generate` or `chat` costs the same whatever was read.
    """

    source: Annotated[Path, tyro.conf.arg(name="from", metavar="FILE")]
    """The UTF-8 text to read; `-` is the standard input."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The file to write, such as book.ctx. It can only be read by you."""
    checkpoint: Positional[OptionalCheckpoint] = shipped.DEFAULT
    """A checkpoint folder, or a training run's: its newest checkpoint; samba-nano comes along."""
    title: str | None = None
    """What to call it; by default the name of the text's file."""
    context: ContextFile = None
    """Read on from this context, which stays as it is."""
    chunk: int = DEFAULT_CHUNK
    """Tokens read at once: more is faster and takes more memory."""
    device: str = "auto"
    """Where to run: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Dtype | None = None
    """Turn the weights into this type; a context goes on only in the type that it was made in."""
    quantize: Quantize | None = None
    """Keep the large weights in 8 or 4 bits a number; a context goes on only with a model quantised the same way."""
    json: JsonFile = None
    """Write the figures to this file too."""


@dataclass(frozen=True)
class Show:
    """Check contexts' files for damage, and tell what was read and by which model."""

    files: Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]]
    """Files made by `samba-lm context save`."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="CKPT")] = None
    """Tell whether this checkpoint can go on from them."""
    dtype: Dtype | None = None
    """The type that the checkpoint's weights would be turned into."""
    quantize: Quantize | None = None
    """The bits that its large weights would be kept in."""
    json: JsonFile = None
    """Write what the table shows, and more, to this file too."""


def main(argv: list[str]) -> None:
    """Run ``context save`` or ``context show``."""
    commands: dict[str, Callable[[list[str]], None]] = {"save": _save, "show": _show}
    commands[argv[0]](argv[1:])


def _save(argv: list[str]) -> None:
    command = parse(Save, argv, prog="samba-lm context save")
    out = output_file(command.out, "--out", "book.ctx")
    check_replaceable(out)
    from_stdin = command.source == Path("-")
    title = check_title(command.title or ("standard input" if from_stdin else title_of(command.source)))
    with contextlib.ExitStack() as stack:
        file = open_stdin().buffer if from_stdin else stack.enter_context(command.source.open("rb"))
        model, tokenizer = load_with_tokenizer(command.checkpoint, command.device, command.dtype, command.quantize)
        from samba_lm.contexts.reading import read_file
        from samba_lm.contexts.snapshot import save

        after = load_context(command.context, model, tokenizer)
        status = stack.enter_context(Console(stderr=True).status("reading"))  # silent unless stderr is a terminal
        told = None if from_stdin else file
        began = time.perf_counter()
        snapshot = read_file(
            model,
            tokenizer,
            file,
            title,
            after=after,
            chunk=command.chunk,
            on_progress=lambda tokens: status.update(f"reading: {tokens:,} tokens{file_share(told)}"),
        )
        seconds = time.perf_counter() - began
        status.update("writing")
        save(out, snapshot, model, tokenizer)
    tokens = snapshot.tokens - (0 if after is None else after.tokens)
    size = out.stat().st_size
    before = "" if after is None else f" after the {after.tokens:,} of {after.title!r}"
    constant = model.config.constant_state
    print(
        f"read {tokens:,} tokens{before} in {seconds:.2f} s ({tokens / seconds:,.0f} tokens/s); "
        f"{out} takes {count(size, 'KMGT')}B"
        + (", however much was read" if constant else ": with full attention it grows with the text")
    )
    if command.json is not None:
        figures = {
            "tokens_read": tokens,
            "read_seconds": seconds,
            "constant_size": constant,
            "device": model.device.type,
        }
        write_json(command.json, {"file": out, **_facts(inspect(out)), **figures})


def _show(argv: list[str]) -> None:
    command = parse(Show, argv, prog="samba-lm context show")
    if not command.files:
        raise UserError("No file was given: name files made by `samba-lm context save`.")
    rows: list[tuple[Path, Info]] = []
    wrong: list[str] = []
    for path in command.files:
        try:
            rows.append((path, inspect(path)))
        except UserError as error:
            wrong.append(str(error))
    fits = _fits(command, [info for _, info in rows]) if rows and command.checkpoint is not None else None
    console = Console()
    if rows:
        console.print(_table(rows, fits, wide=console.width >= 100))
    for path, reason in zip([path for path, _ in rows], fits or (), strict=False):
        if reason is not None:
            console.print(f"{path} {reason}", markup=False, highlight=False)
    if command.json is not None:
        reasons = fits or [None] * len(rows)
        told = [
            {"file": path, **_facts(info), **({} if fits is None else {"fits": reason is None, "reason": reason})}
            for (path, info), reason in zip(rows, reasons, strict=True)
        ]
        write_json(command.json, {"contexts": told, "refused": wrong})
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(wrong[0] + more)


def _fits(command: Show, infos: list[Info]) -> list[str | None]:
    """Why the checkpoint cannot go on from each, or None where it can."""
    assert command.checkpoint is not None
    model, tokenizer = load_with_tokenizer(command.checkpoint, "cpu", command.dtype, command.quantize)
    from samba_lm.contexts.identity import mismatch

    return [mismatch(info.made_by, model, tokenizer) for info in infos]


def _table(rows: list[tuple[Path, Info]], fits: list[str | None] | None, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for column in ("title", "model", "dtype", "created") if wide else ("title", "model"):
        table.add_column(column, overflow="fold")
    if fits is not None:
        table.add_column("fits", no_wrap=True)
    for i, (path, info) in enumerate(rows):
        parameters, _, computed = info.made_by.dtype.partition("/")
        dtype = parameters if parameters == computed else info.made_by.dtype
        cells = [str(path), f"{info.tokens:,}", count(info.nbytes, "KMGT") + "B", info.title, info.made_by.model]
        cells += [dtype, info.created[:16].replace("T", " ")] if wide else []
        cells += [] if fits is None else ["yes" if fits[i] is None else "no"]
        table.add_row(*(Text(cell) for cell in cells))  # Text: what stands in brackets is no markup
    return table


def _facts(info: Info) -> dict[str, object]:
    return {
        "title": info.title,
        "created": info.created,
        "tokens": info.tokens,
        "token_hash": info.read.hexdigest(),
        "bytes": info.nbytes,
        "made_by": dataclasses.asdict(info.made_by),
        "made_on": info.device,
    }
