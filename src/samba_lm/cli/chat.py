"""``samba-lm chat``: a conversation with a checkpoint, its state kept between turns."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes, Positional

from samba_lm.cli.generate import SamplingOptions, open_stdin
from samba_lm.cli.model import CheckpointName, ContextFile, Dtype, load_context, load_with_tokenizer
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError, did_you_mean
from samba_lm.files import write_text
from samba_lm.generation.params import DEFAULT_CHUNK

if TYPE_CHECKING:
    from samba_lm.generation.chat import ChatSession

COMMANDS = {
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation to a file",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}


@dataclass(frozen=True)
class Chat:
    """Talk with a checkpoint. Each turn reads only its new tokens, however long the conversation.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.
    """

    checkpoint: Positional[CheckpointName]
    """A checkpoint folder, or a training run's: its newest checkpoint."""
    system: str | None = None
    """What stands before the first message."""
    context: ContextFile = None
    """Talk about what was read into this file of `samba-lm context save`."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    chunk: int = DEFAULT_CHUNK
    """Tokens of a message read at once: more is faster and takes more memory."""
    device: str = "auto"
    """Where to run: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Dtype | None = None
    """Turn the weights into this type; by default they stay as the checkpoint has them."""


def main(argv: list[str]) -> None:
    """Run ``samba-lm chat`` with these arguments."""
    command = parse(Chat, argv, prog="samba-lm chat")
    from samba_lm.generation.chat import ChatSession  # only now: --help should not wait for torch

    stdin = open_stdin()
    model, tokenizer = load_with_tokenizer(command.checkpoint, command.device, command.dtype)
    snapshot = load_context(command.context, model, tokenizer)
    context = None if snapshot is None else snapshot.reader()
    session = ChatSession(
        model, tokenizer, command.system, params=command.sampling, chunk=command.chunk, context=context
    )
    interactive = stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives input() line editing and a history

        print("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            _run_command(line, session)
        elif line:
            _answer(line, session)


def _run_command(line: str, session: ChatSession) -> None:
    word, _, argument = line.partition(" ")
    if word == "/reset":
        session.reset()
        print("(the conversation is forgotten)")
    elif word == "/save" and argument.strip():
        path = Path(argument.strip()).expanduser()
        try:
            write_text(path, session.text)
        except (UserError, OSError) as error:
            print(f"({error})")  # the conversation goes on
        else:
            print(f"(written to {path})")
    elif word == "/help":
        for name, help_text in COMMANDS.items():
            print(f"  {name:<12}{help_text}")
    elif word == "/save":
        print("(/save needs a file: /save talk.txt)")
    else:
        print(f"({word} is not a command.{did_you_mean(word, [name.split()[0] for name in COMMANDS])})")


def _answer(message: str, session: ChatSession) -> None:
    with _ctrl_c() as pressed:

        def leave_if_pressed(tokens: int) -> None:
            if pressed:
                raise KeyboardInterrupt

        answer = session.ask(message, on_progress=leave_if_pressed)
        try:
            for piece in answer:
                print(piece, end="", flush=True)
                if pressed:
                    answer.close()
            print()
        except KeyboardInterrupt:
            print("\n(stopped: the message is not part of the conversation)")
        except UserError as error:
            print(f"\n({error})")


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Turn Ctrl-C into an entry in the list, to be looked at between two tokens; a second one interrupts at once.

    An exception at any instruction could leave the state half advanced, and the whole turn would have to be taken back.
    """
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
