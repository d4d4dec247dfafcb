"""``samba-lm chat``: a conversation with a checkpoint, its state kept between turns."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes, Positional

from samba_lm import shipped
from samba_lm.cli.chat_commands import complete, is_command, run_command
from samba_lm.cli.chat_input import Entry, History, Prompt, history_path
from samba_lm.cli.chat_room import FIRST, Conversation, Room
from samba_lm.cli.chat_view import View
from samba_lm.cli.generate import SamplingOptions, open_stdin
from samba_lm.cli.main import for_people
from samba_lm.cli.model import ContextFile, OptionalCheckpoint, Runtime, RuntimeOptions, base_note, load_context
from samba_lm.cli.parse import parse
from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK

HINT = "Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."
WRITTEN = "What you say is written as 'User:', and it goes on after 'Assistant:'."
BASE = f"A base model: it was trained to continue texts, not to follow what you ask. {WRITTEN}"

TAUGHT = "What you say is written out by the model's own chat template."


@dataclass(frozen=True)
class Chat:
    """Talk with a checkpoint. Each turn reads only its new tokens, however long the conversation.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands; Tab completes them.
    On a pipe each line is a message.
    """

    checkpoint: Positional[OptionalCheckpoint] = shipped.DEFAULT
    """A checkpoint folder, or a training run's: its newest checkpoint; samba-nano comes along."""
    system: str | None = None
    """What stands before the first message."""
    context: ContextFile = None
    """Talk about what was read into this file of `samba-lm context save`."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    chunk: int = DEFAULT_CHUNK
    """Tokens of a message read at once: more is faster and takes more memory."""
    runtime: RuntimeOptions = field(default_factory=Runtime)
    history: bool = True
    """Remember what you type for the next chat, in a file that only you can read."""


def main(argv: list[str]) -> None:
    """Run ``samba-lm chat`` with these arguments."""
    command = parse(Chat, argv, prog="samba-lm chat")
    from samba_lm.generation.chat import ChatSession  # only now: --help should not wait for torch
    from samba_lm.templates import PlainTemplate, template_of

    stdin = open_stdin()
    model, tokenizer = command.runtime.load(command.checkpoint)
    context = load_context(command.context, model, tokenizer)
    template = template_of(tokenizer)
    session = ChatSession(
        model,
        tokenizer,
        command.system,
        template,
        params=command.sampling,
        chunk=command.chunk,
        context=None if context is None else context.reader(),
    )
    view = View(sys.stdout)
    history = History(history_path() if command.history and stdin.isatty() else None)
    prompt = Prompt(stdin, history, lambda line: complete(line, room), view.colour)
    room = Room(model, tokenizer, view, prompt, {FIRST: Conversation(session, context)})
    note = base_note(command.checkpoint) if isinstance(template, PlainTemplate) else None
    if prompt.interactive:
        if isinstance(template, PlainTemplate):
            view.note(BASE if note is None else f"{note} {WRITTEN}")
        else:
            view.note(TAUGHT)
        view.note(HINT)
    elif note is not None:
        print(f"samba-lm: {note}", file=sys.stderr)
    _talk(room, history)


def _talk(room: Room, history: History) -> None:
    presses = 0
    while not room.left:
        if history.trouble is not None:
            room.view.error(history.trouble)
            history.trouble = None
        try:
            entry = room.prompt.read("> " if room.name == FIRST else f"{room.name}> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not room.prompt.interactive:
                raise
            print()
            presses += 1
            if presses > 1:
                room.view.note("Ctrl-D or /quit leaves")
            continue
        presses = 0
        if entry.text.strip():
            _obey(entry, room)


def _obey(entry: Entry, room: Room) -> None:
    """Do what was typed; what goes wrong is told in a line, and the conversation goes on."""
    try:
        if not entry.plain and is_command(entry.text):
            run_command(entry.text, room)
        else:
            room.answer(lambda on_progress: room.session.ask(entry.text, on_progress))
    except KeyboardInterrupt:
        room.view.note("stopped")
    except BrokenPipeError:
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = for_people(error)
        if message is None:
            raise
        room.view.error(message)
