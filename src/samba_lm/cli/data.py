"""``samba-lm data``: make token shards from text, look at them, check them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tyro.conf import Positional, UseAppendAction

from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.data.hub import is_hub
from samba_lm.data.prepare import prepare
from samba_lm.data.shards import DEFAULT_SHARD_TOKENS, Meta, TokenDataset, open_splits
from samba_lm.errors import UserError
from samba_lm.tokenizer import parse_tokenizer

_MAX_PROCESSES = 16  # reading, in one process, feeds no more


@dataclass(frozen=True)
class Prepare:
    """Turn text into token shards: `samba-lm data prepare books/ notes.jsonl.gz --tokenizer bpe:8192 --out data/books`.

    Reads .txt (a file is a document), .jsonl and .ndjson (a line is one), .parquet (a row is one), the first three also
    as .gz, .xz, .bz2 or .zst, and folders of these. Other files named one by one are read as plain text. The same input
    gives the same bytes. On any error, or Ctrl-C, nothing is left behind.
    """

    inputs: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE|FOLDER|hf:NAME ...")]]
    """What to read; hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT: rows of a data set of the Hugging Face hub, or of a
    folder that the package `datasets` reads, as a stream (extra: datasets)."""
    out: Path
    """The folder to make."""
    tokenizer: str = "byte"
    """byte, bpe:SIZE (trained on the input) or a tokenizer.json or its folder."""
    eos: str | None = None
    """The token of the tokenizer's file that separates documents, where it has no usual name."""
    val_fraction: float = 0.0
    """Share of the documents to set aside: OUT/train and OUT/val are made instead of OUT."""
    field: str = "text"
    """The text's field in JSON lines, or column in Parquet and in data sets of the hub."""
    take: int | None = None
    """Of each data set of the hub so many rows, the first ones; none: all."""
    suffix: UseAppendAction[tuple[str, ...]] = ()
    """Take files with this ending too from folders, as plain text, such as .py; may be given several times."""
    errors: Literal["strict", "replace"] = "strict"
    """On bytes that are not UTF-8: stop and say where, or put the replacement character there and go on."""
    processes: int = min(os.cpu_count() or 1, _MAX_PROCESSES)
    """How many processes encode at once; the result does not depend on it."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """A shard ends with the document that reaches this many tokens."""
    overwrite: bool = False
    """Replace prepared data that is already at OUT."""
    json: JsonFile = None
    """Write the counts to this file too."""


@dataclass(frozen=True)
class Show:
    """Count the tokens and documents of prepared data, and decode an excerpt."""

    folder: Positional[str]
    """A folder made by `samba-lm data prepare`, or the URL of one (s3://, gs://, hf://, https://)."""
    document: int = 0
    """The document the excerpt is from."""
    tokens: int = 100
    """Length of the excerpt in tokens."""
    json: JsonFile = None
    """Write the counts to this file too."""


@dataclass(frozen=True)
class Verify:
    """Read prepared data whole and compare it with its checksums."""

    folder: Positional[str]
    """A folder made by `samba-lm data prepare`, or the URL of one (s3://, gs://, hf://, https://)."""
    json: JsonFile = None
    """Write the counts to this file too."""


def main(argv: list[str]) -> None:
    """Run ``data prepare``, ``data show`` or ``data verify``."""
    commands: dict[str, Callable[[list[str]], None]] = {"prepare": _prepare, "show": _show, "verify": _verify}
    commands[argv[0]](argv[1:])


def _prepare(argv: list[str]) -> None:
    options = parse(Prepare, argv, prog="samba-lm data prepare")
    began = time.perf_counter()
    with shown_progress() as tell:
        prepared = prepare(
            options.inputs,
            options.out,
            parse_tokenizer(options.tokenizer, eos=options.eos),
            processes=options.processes,
            errors=options.errors,
            field=options.field,
            suffixes=options.suffix,
            take=options.take,
            val_fraction=options.val_fraction,
            shard_tokens=options.shard_tokens,
            overwrite=options.overwrite,
            progress=tell,
        )
    seconds = time.perf_counter() - began
    for name, meta in prepared.splits.items():
        print(f"{prepared.folder / name}: {_counts(meta)}")
    skipped = f"; skipped {prepared.empty_documents:,} empty document(s)" if prepared.empty_documents else ""
    what = "input(s)" if any(is_hub(given) for given in options.inputs) else "file(s)"
    print(f"Read {prepared.files:,} {what} in {seconds:.1f} s{skipped}.")
    for note in prepared.notes:
        print(f"Note: {note}")
    if options.json:
        write_json(
            options.json,
            {
                "folder": prepared.folder,
                "tokenizer": {"vocab_size": prepared.tokenizer.vocab_size, "eos": prepared.tokenizer.eos_token},
                "splits": {name or ".": _record(meta) for name, meta in prepared.splits.items()},
                "files": prepared.files,
                "empty_documents": prepared.empty_documents,
                "notes": prepared.notes,
                "seconds": seconds,
            },
        )


def _show(argv: list[str]) -> None:
    options = parse(Show, argv, prog="samba-lm data show")
    datasets = _open(options.folder)
    first = datasets[0]
    if not 0 <= options.document < first.num_documents:
        raise UserError(f"--document {options.document}: {first.folder} has documents 0 to {first.num_documents - 1}.")
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: an excerpt has at least 1 token.")
    for dataset in datasets:
        print(f"{dataset.folder}: {_counts(dataset.meta)}")
    start, stop = first.document_bounds(options.document)
    excerpt = first.tokenizer.decode(first.tokens(start, min(stop, start + options.tokens)))
    print(
        f"Document {options.document} of {first.folder}, {stop - start:,} tokens, begins:\n\n{_visible(excerpt)}",
    )
    if options.json:
        record = {str(dataset.folder): _record(dataset.meta) for dataset in datasets}
        write_json(options.json, {"datasets": record, "document": options.document, "excerpt": excerpt})


def _verify(argv: list[str]) -> None:
    options = parse(Verify, argv, prog="samba-lm data verify")
    datasets = _open(options.folder)
    for dataset in datasets:
        with shown_progress() as tell:
            dataset.verify(lambda done, total: tell("verifying", done, total))
        print(f"{dataset.folder}: whole. {_counts(dataset.meta)}")
    if options.json:
        record = {str(dataset.folder): _record(dataset.meta) for dataset in datasets}
        write_json(options.json, {"datasets": record, "whole": True})


def _open(folder: str) -> list[TokenDataset]:
    return [dataset for dataset in open_splits(folder) if dataset is not None]


def _counts(meta: Meta) -> str:
    bytes_per_token = meta.text_bytes / meta.tokens
    return (
        f"{meta.tokens:,} tokens ({meta.dtype}) in {meta.documents:,} document(s) and {len(meta.shards)} shard(s); "
        f"vocabulary {meta.vocab_size:,}; {meta.text_bytes / 1e6:,.1f} MB of text, {bytes_per_token:.2f} bytes a token"
    )


def _record(meta: Meta) -> dict[str, object]:
    return meta.model_dump(exclude={"shards"}) | {"shards": len(meta.shards)}


def _visible(text: str) -> str:
    # What was read may hold escape sequences, which a terminal would obey.
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function to be told of the stage and the amount done; draws a bar on stderr, if that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None)
            progress.update(tasks[stage], completed=done)

        yield tell
