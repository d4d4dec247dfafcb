"""``samba-lm ask``: a question about what was read, from a context's file or from a text."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from samba_lm.cli.generate import SamplingOptions, open_stdin, write_continuation
from samba_lm.cli.model import CheckpointName, ContextFile, Runtime, RuntimeOptions, load_context
from samba_lm.cli.output import JsonFile
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK
from samba_lm.generation.prompt import Prompt, encode_pieces, read_text

QUESTION = "{question}"
WORDING = r"\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Ask:
    """Ask about a context, a text, or nothing at all: `samba-lm ask CKPT --context book.ctx "Who is it about?"`.

    The answer goes to stdout as it is made, what it cost to stderr. The context stays as it is, so the next question
    starts from it too, at the same small cost.
    """

    checkpoint: Positional[CheckpointName]
    """A checkpoint folder, or a training run's: its newest checkpoint."""
    question: Positional[Annotated[str, tyro.conf.arg(metavar="QUESTION")]]
    """What to ask."""
    context: ContextFile = None
    """A file made by `samba-lm context save`, to ask about."""
    file: Path | None = None
    """A UTF-8 text to ask about, read now (after the context, if both are given); `-` is the standard input."""
    wording: str = WORDING
    r"""How the question is put to a model that continues texts: {question} stands for it, \n for a new line. What
    stands before it ends the answer, too, should the model go on to ask itself."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    chunk: int = DEFAULT_CHUNK
    """Tokens read at once: more is faster and takes more memory."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    json: JsonFile = None
    """Write the figures of the last line to this file too."""


def main(argv: list[str]) -> None:
    """Run ``samba-lm ask`` with these arguments."""
    command = parse(Ask, argv, prog="samba-lm ask")
    if not command.question.strip():
        raise UserError("The question is empty: write it between quotes.")
    wording, stop = worded(command.wording, command.question)
    with contextlib.ExitStack() as stack:
        from_stdin = command.file == Path("-")
        file = None
        if command.file is not None:
            file = open_stdin().buffer if from_stdin else stack.enter_context(command.file.open("rb"))
        model, tokenizer = command.runtime.load(command.checkpoint)
        context = load_context(command.context, model, tokenizer)
        prompt: Prompt = wording
        if file is not None:
            text = encode_pieces(read_text(file, "The standard input" if from_stdin else str(command.file)), tokenizer)
            prompt = itertools.chain(text, [tokenizer.encode(wording)])
        elif context is None:
            prompt = wording.lstrip()  # nothing stands before it
        sampling = command.sampling.replace(stop=(*command.sampling.stop, *stop))
        write_continuation(
            command, model, tokenizer, prompt, sampling, None if from_stdin else file, context, strip=True
        )


def worded(wording: str, question: str) -> tuple[str, tuple[str, ...]]:
    r"""The question as the model reads it, and the strings that end its answer; ``\n`` in the wording is a new line.

    Raises UserError where the wording has no place for the question.
    """
    if QUESTION not in wording:
        raise UserError(f"--wording {wording!r} has no place for the question: write {QUESTION} in it.")
    wording = wording.replace(r"\n", "\n")
    opening = wording.partition(QUESTION)[0].strip()
    return wording.replace(QUESTION, question.strip()), (f"\n{opening}",) if opening else ()
