"""The conversations of one chat, by name, and how an answer is shown and stopped."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from samba_lm.cli.chat_input import Prompt
from samba_lm.cli.chat_view import View
from samba_lm.cli.model import with_one_thread
from samba_lm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from samba_lm.contexts.snapshot import Snapshot
    from samba_lm.generation.chat import ChatSession
    from samba_lm.generation.prefill import OnProgress
    from samba_lm.model import SambaLM
    from samba_lm.tokenizer import Tokenizer

FIRST = "main"
_NAME = re.compile(r"[\w.-]{1,20}")
PATIENCE = 0.5
"""Seconds of reading before it is told how far it is."""


@dataclass(frozen=True)
class Conversation:
    """A session, and what was read before it."""

    session: ChatSession
    context: Snapshot | None


@dataclass
class Room:
    """Conversations with one model; one of them is the current one."""

    model: SambaLM
    tokenizer: Tokenizer
    view: View
    prompt: Prompt
    conversations: dict[str, Conversation]
    name: str = FIRST
    left: bool = field(default=False, init=False)
    """Somebody asked to leave."""

    @property
    def current(self) -> Conversation:
        return self.conversations[self.name]

    @property
    def session(self) -> ChatSession:
        return self.current.session

    def check_name(self, name: str) -> str:
        """A name for a new conversation. Raises UserError for one that is taken or no name."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{name[:40]!r} is no name: take up to 20 letters, digits, '.', '-' and '_'.")
        if name in self.conversations:
            raise UserError(f"There is a conversation {name!r} already: take another name, or /drop {name}.")
        return name

    def free_name(self, wish: str) -> str:
        """A name like ``wish`` that is not taken."""
        wish = "".join(re.findall(r"[\w.-]", wish))[:16] or "fork"
        names = [wish, *(f"{wish}-{number}" for number in range(2, len(self.conversations) + 3))]
        return next(name for name in names if name not in self.conversations)

    def switch(self, name: str) -> None:
        """Go on in another conversation. Raises UserError where there is none of that name."""
        self.find(name)
        self.name = name

    def find(self, name: str) -> Conversation:
        """The conversation of that name. Raises UserError where there is none."""
        if name not in self.conversations:
            raise UserError(f"There is no conversation {name!r}.{did_you_mean(name, self.conversations)}")
        return self.conversations[name]

    def enter(self, conversation: Conversation, wish: str) -> str:
        """Go on in a new conversation; one in which something was said stays. What is to be told of that."""
        if not self.session.text:
            self.conversations[self.name] = conversation
            return ""
        before, self.name = self.name, self.free_name(wish)
        self.conversations[self.name] = conversation
        return f"; this is {self.name!r}, /switch {before} goes back"

    def answer(self, ask: Callable[[OnProgress], Iterator[str]]) -> bool:
        """Show an answer as it comes, until it ends or Ctrl-C; whether it became part of the conversation.

        Ctrl-C while the message is still being read takes the message back. Raises UserError and what the machine
        says (no memory left), with the conversation as it was before.
        """
        session = self.session
        turns, before = session.turns, session.reader.lengths[0]
        stopped = False
        with self.prompt.silent(), ctrl_c() as pressed, self.view.answer() as show:
            began = time.monotonic()

            def on_progress(tokens: int) -> None:
                if pressed:
                    raise KeyboardInterrupt
                if time.monotonic() - began > PATIENCE:
                    self.view.status(f"reading: {tokens - before:,} tokens")

            pieces = with_one_thread(ask(on_progress), self.model)
            try:
                for piece in pieces:
                    show(piece)
                    if pressed:
                        stopped = True
                        break
            except KeyboardInterrupt:
                stopped = True
            session.leave()  # the state is brought to what was shown, while Ctrl-C still waits
        kept = session.turns > turns
        if not kept:
            self.view.note("stopped: the message is not part of the conversation")
        elif self.view.terminal:
            limit = session.params.max_tokens
            if stopped:
                self.view.note("stopped")
            elif session.timing.finish == "length":
                self.view.note(f"it ends at max_tokens={limit}: /set max_tokens unlimited")
            elif session.timing.new_tokens == 0:
                self.view.note("the model ended its answer at once: /retry draws another")
        return kept

    @contextlib.contextmanager
    def reading(self, before: int = 0) -> Iterator[OnProgress]:
        """Show how far a file was read, that begins after ``before`` tokens of something else."""
        with self.prompt.silent():
            yield lambda tokens: self.view.status(f"reading: {tokens - before:,} tokens")


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """Turn Ctrl-C into an entry in the list, to be looked at between two tokens; a second one interrupts at once.

    An exception at any instruction could leave the state half advanced, and the whole turn would have to be taken back.
    """
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
