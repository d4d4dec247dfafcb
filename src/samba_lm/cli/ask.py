"""``samba-lm ask``: a question about what was read, from a context's file or from a text."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from samba_lm import shipped
from samba_lm.cli.generate import SamplingOptions, open_stdin, write_continuation
from samba_lm.cli.model import ContextFile, Runtime, RuntimeOptions, base_note, is_checkpoint, load_context
from samba_lm.cli.output import JsonFile
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK
from samba_lm.generation.prompt import Prompt, TokenIds, encode_pieces, read_text

if TYPE_CHECKING:
    from samba_lm.tokenizer import Tokenizer

QUESTION = "{question}"
WORDING = r"\n\nQuestion: {question}\nAnswer:"
BEGUN = r"\n{question}"
"""The wording of a question that ends in the beginning of its answer."""
NANO = r"\n{question} The answer is"
"""The usual wording for the model that comes along: it goes on with a sentence, and knows no "Answer:"."""


@dataclass(frozen=True)
class Ask:
    """Ask about a context, a text, or nothing at all: `samba-lm ask --context book.ctx "Who is it about?"`.

    The answer goes to stdout as it is made, what it cost to stderr. The context stays as it is, so the next question
    starts from it too, at the same small cost. One argument alone is the question.

    A base model answers best what it only needs to go on with: a question that ends in the beginning of its answer,
    such as "What is the pass key? The pass key is", is read as it stands, and answered to the end of the line.
    """

    checkpoint: Positional[Annotated[str | None, tyro.conf.arg(metavar="[CKPT]")]] = None
    """A checkpoint folder, or a training run's: its newest checkpoint; by default samba-nano, which comes along."""
    question: Positional[Annotated[str | None, tyro.conf.arg(metavar="QUESTION")]] = None
    """What to ask."""
    context: ContextFile = None
    """A file made by `samba-lm context save`, to ask about."""
    file: Path | None = None
    """A UTF-8 text to ask about, read now (after the context, if both are given); `-` is the standard input."""
    wording: str | None = None
    r"""How the question is put to a model that continues texts: {question} stands for it, \n for a new line. What
    stands before it ends the answer, too, should the model go on to ask itself. By default
    \n\nQuestion: {question}\nAnswer: (samba-nano: \n{question} The answer is), and \n{question} where the answer is
    begun."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(
        default_factory=lambda: SamplingOptions(temperature=0.0, max_tokens=64)
    )
    chunk: int = DEFAULT_CHUNK
    """Tokens read at once: more is faster and takes more memory."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    json: JsonFile = None
    """Write the figures of the last line to this file too."""

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return self.checkpoint or shipped.DEFAULT


def main(argv: list[str]) -> None:
    """Run ``samba-lm ask`` with these arguments."""
    command = _sorted(parse(Ask, argv, prog="samba-lm ask"))
    question = command.question or ""
    if not question.strip():
        raise UserError("The question is empty: write it between quotes.")
    usual = WORDING if shipped.find(command.name) is None else NANO
    wording, stop = worded(command.wording, question, usual)
    with contextlib.ExitStack() as stack:
        from_stdin = command.file == Path("-")
        file = None
        if command.file is not None:
            file = open_stdin().buffer if from_stdin else stack.enter_context(command.file.open("rb"))
        model, tokenizer = command.runtime.load(command.name)
        if note := base_note(command.name):
            print(f"samba-lm: {note}", file=sys.stderr)
        context = load_context(command.context, model, tokenizer)
        prompt: Prompt = wording
        if file is not None:
            text = read_text(file, "The standard input" if from_stdin else str(command.file))
            prompt = _followed(text, wording, tokenizer)
        elif context is None:
            prompt = wording.lstrip()  # nothing stands before it
        sampling = command.sampling.replace(stop=(*command.sampling.stop, *stop))
        write_continuation(
            command, model, tokenizer, prompt, sampling, None if from_stdin else file, context, strip=True
        )


def _sorted(command: Ask) -> Ask:
    """Tell which of the two arguments a lone one is."""
    word = command.checkpoint
    if word is None:
        raise UserError("There is no question: write it between quotes.")
    if command.question is not None:
        return command
    if is_checkpoint(word):
        raise UserError(f"{word} is a checkpoint, and there is no question: write it behind, between quotes.")
    return dataclasses.replace(command, checkpoint=None, question=word)


def _followed(text: Iterator[str], wording: str, tokenizer: Tokenizer) -> Iterator[TokenIds]:
    """The tokens of a text and of what follows it; between two lines there is one break."""
    last = ""

    def noted() -> Iterator[str]:
        nonlocal last
        for piece in text:
            last = piece[-1]
            yield piece

    yield from encode_pieces(noted(), tokenizer)
    single = last == "\n" and not wording.startswith("\n\n")
    yield tokenizer.encode(wording.removeprefix("\n") if single else wording)


def worded(wording: str | None, question: str, usual: str = WORDING) -> tuple[str, tuple[str, ...]]:
    r"""The question as the model reads it, and the strings that end its answer; ``\n`` in the wording is a new line.

    Without a wording it is the usual one, or that of a question whose answer is begun. An answer that goes on in the
    question's line ends with it.

    Raises UserError where the wording has no place for the question.
    """
    begun = re.search(r"\?\s+\S.*[^\s.?!]\s*$", question, re.DOTALL) is not None
    chosen = wording if wording is not None else BEGUN if begun else usual
    if QUESTION not in chosen:
        raise UserError(f"--wording {chosen!r} has no place for the question: write {QUESTION} in it.")
    inline = wording is None and chosen in (BEGUN, NANO)
    chosen = chosen.replace(r"\n", "\n")
    opening = chosen.partition(QUESTION)[0].strip()
    ends = ("\n",) if inline else (f"\n{opening}",) if opening else ()
    return chosen.replace(QUESTION, question.strip()), ends
