"""``samba-lm data chat``: look at conversations as a model will learn them, and prepare large sets once."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from samba_lm import shipped
from samba_lm.cli.data import shown_progress
from samba_lm.cli.output import JsonFile, write_json
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError

if TYPE_CHECKING:
    from samba_lm.data.conversation_set import Encoded
    from samba_lm.tokenizer import Tokenizer

_MAX_PROCESSES = 16


@dataclass(frozen=True)
class DataChat:
    """Show how conversations are learnt: the first one written out, the answers marked, and counts of all.

    Reads JSON lines, each {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...},
    also as .gz, .xz, .bz2 or .zst. With --out they are prepared: a recipe's data.chat.files takes that folder, or the
    files themselves where they are small.
    """

    inputs: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE|FOLDER ...")]]
    """What to read."""
    model: str = shipped.DEFAULT
    """The checkpoint that will be fine-tuned: its tokenizer and chat template write the conversations out."""
    out: Path | None = None
    """The folder to make."""
    val_fraction: float = 0.0
    """Share of the conversations to set aside: OUT/train and OUT/val are made instead of OUT."""
    processes: int = min(os.cpu_count() or 1, _MAX_PROCESSES)
    """How many processes encode at once; the result does not depend on it."""
    overwrite: bool = False
    """Replace prepared conversations that are already at OUT."""
    json: JsonFile = None
    """Write the counts to this file too."""


def main(argv: list[str]) -> None:
    """Run ``data chat``."""
    options = parse(DataChat, argv[1:], prog="samba-lm data chat")
    if options.out is None and (options.val_fraction or options.overwrite):
        raise UserError("--val-fraction and --overwrite are of what is prepared: give --out FOLDER.")
    from samba_lm import checkpoint
    from samba_lm.data.conversation_set import encode_conversations, prepare_conversations
    from samba_lm.data.sources import find_files
    from samba_lm.tokenizer import load_tokenizer

    folder = checkpoint.find(options.model)
    if folder is None:
        raise UserError(f"--model {options.model}: there is no such checkpoint's folder, nor a model that comes along.")
    tokenizer = load_tokenizer(folder)
    files = find_files(options.inputs)
    with closing(encode_conversations(files, tokenizer, processes=1)) as encoded:
        first = next(encoded, None)
    if first is None:
        raise UserError(f"There is no conversation in {', '.join(options.inputs)}.")
    _show(first, tokenizer)
    if options.out is not None:
        with shown_progress() as tell:
            made = prepare_conversations(
                options.inputs,
                options.out,
                tokenizer,
                processes=options.processes,
                val_fraction=options.val_fraction,
                overwrite=options.overwrite,
                progress=tell,
            )
        counts = {
            str(options.out / name): (meta.conversations, meta.tokens, meta.answer_tokens, meta.longest)
            for name, meta in made.items()
        }
    else:
        with closing(encode_conversations(files, tokenizer, options.processes)) as encoded, shown_progress() as tell:
            sizes = []
            for each in encoded:
                sizes.append((each.ids.size, int(each.answers.sum())))
                tell("encoding", each.done, sum(file.size for file in files))
        tokens, answers = zip(*sizes, strict=True)
        counts = {", ".join(options.inputs): (len(sizes), sum(tokens), sum(answers), max(tokens))}
    for name, (conversations, total, learnt, longest) in counts.items():
        print(
            f"{name}: {conversations:,} conversations, {total:,} tokens, {learnt:,} of them in answers; the longest "
            f"has {longest:,} (train.length {longest - 1:,} cuts none)."
        )
    if options.json is not None:
        named = ("conversations", "tokens", "answer_tokens", "longest")
        write_json(options.json, {name: dict(zip(named, each, strict=True)) for name, each in counts.items()})


def _show(first: Encoded, tokenizer: Tokenizer) -> None:
    """The first conversation as it is learnt, its answers bold and between bars."""
    names = {tokenizer.eos_id: tokenizer.eos_token}
    text = Text()
    ids, answers = first.ids.tolist(), first.answers.tolist()
    start = 0
    for i in range(1, len(ids) + 1):
        if i < len(ids) and answers[i] == answers[start]:
            continue
        piece = "".join(_written(tokenizer, run, names) for run in _runs(ids[start:i], names))
        text.append(f"\u2503{piece}\u2503" if answers[start] else piece, "bold" if answers[start] else "")
        start = i
    print(f"{first.conversation.where} as it is learnt, what counts between \u2503:\n")
    Console(highlight=False).print(text, soft_wrap=True)
    print()


def _runs(ids: list[int], apart: dict[int, str]) -> list[list[int]]:
    """The ids in pieces: those of ``apart`` alone, what is between them together."""
    runs: list[list[int]] = [[]]
    for token in ids:
        if token in apart:
            runs += [[token], []]
        else:
            runs[-1].append(token)
    return [run for run in runs if run]


def _written(tokenizer: Tokenizer, run: list[int], names: dict[int, str]) -> str:
    text = names.get(run[0]) or tokenizer.decode(run)
    # What was read may hold escape sequences, which a terminal would obey.
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
