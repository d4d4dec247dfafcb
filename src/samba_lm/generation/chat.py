"""A conversation whose state is kept: each turn reads only its new tokens."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import OnProgress, Reader, prefill
from samba_lm.generation.stream import Answer, advance, check_request, draw
from samba_lm.model import SambaLM, evaluating
from samba_lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written out for a base model. ``{text}`` stands for what was said."""

    system: str = "{text}\n\n"
    user: str = "User: {text}\nAssistant:"
    """A message, and what invites the answer (without a final space: tokenizers join it to the word that follows)."""
    end: str = "\n"
    """What stands between an answer and the next message."""
    stop: tuple[str, ...] = ("\nUser:", "\nAssistant:")
    """What ends an answer, besides the end-of-text token: the start of somebody's next message."""

    def __post_init__(self) -> None:
        for name, pattern in (("system", self.system), ("user", self.user)):
            if "{text}" not in pattern:
                raise UserError(
                    f"The chat template's {name}={pattern!r} has no place for the text: write {{text}} in it."
                )


DEFAULT_TEMPLATE = ChatTemplate()


class ChatSession:
    """A conversation with a model, in memory that does not grow with it (but for :attr:`text`).

    Between turns the state is that of a model which has read exactly :attr:`text`, after its context: neither a stop
    string nor half a character stays in it. (Read anew as a whole, a BPE may cut the same text into other tokens.)

    Args:
        system: what stands before the first message; None: nothing.
        params: how answers are drawn; the template's stop strings are added to its own.
        context: what was read before the conversation, such as ``Snapshot.reader()``; it is copied, never changed.

    Attributes:
        reader: where the conversation stands: the model's state and the number of tokens in it.
        tokens_fed: tokens that went through the model since the start, those later taken back included.

    Raises UserError when the tokenizer does not fit the model, or ``chunk`` is below 1.
    """

    def __init__(
        self,
        model: SambaLM,
        tokenizer: Tokenizer,
        system: str | None = None,
        template: ChatTemplate = DEFAULT_TEMPLATE,
        params: SamplingParams | None = None,
        chunk: int = DEFAULT_CHUNK,
        context: Reader | None = None,
    ) -> None:
        check_request(model, tokenizer, chunk)
        params = params or SamplingParams()
        self._model = model
        self._tokenizer = tokenizer
        self._system = system
        self._template = template
        self._params = params.replace(stop=(*params.stop, *template.stop))
        self._chunk = chunk
        self._context = context
        self._turn: Generator[str, None, None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the context and the system text stay."""
        self._leave_turn()
        self.reader = Reader.create(self._model, self._params, batch=1, context=self._context)
        self._parts: list[str] = []
        self.tokens_fed = 0

    @property
    def text(self) -> str:
        """The conversation so far, exactly as the model has read it."""
        return "".join(self._parts)

    def ask(self, message: str, on_progress: OnProgress | None = None) -> Generator[str, None, None]:
        """Read a message and yield the answer in pieces, one a token, some of them empty.

        Closing the generator, or asking again, ends the answer there: what was yielded stays part of the conversation.
        After any error, Ctrl-C included, the conversation is as it was before the message.
        """
        self._leave_turn()
        self._turn = self._take_turn(message, on_progress)
        return self._turn

    def _leave_turn(self) -> None:
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    @torch.inference_mode()
    def _take_turn(self, message: str, on_progress: OnProgress | None) -> Generator[str, None, None]:
        before, parts_before = self.reader.fork(), len(self._parts)
        kept = False
        try:
            with evaluating(self._model):
                opening = self._template.end if self._parts else self._system_text()
                question = opening + self._template.user.replace("{text}", message)
                self._read(question, on_progress)
                self._parts.append(question)
                yield from self._answer()
            kept = True
        except GeneratorExit:
            kept = True
            raise
        finally:
            if not kept:
                # The state may be half advanced: some layers have read a token that others have not.
                self.reader = before
                del self._parts[parts_before:]

    def _answer(self) -> Generator[str, None, None]:
        answer = Answer(self._tokenizer, self._params)
        if self.reader.history is not None:
            self.reader.history.counts.zero_()  # what was generated in earlier turns is prompt by now
        # Where the conversation stood when all text of its tokens had last been shown, if tokens were read since, and
        # the text shown since; half a stop string or half a character is taken back by returning there.
        safe: Reader | None = None
        since = ""
        unread: list[int] | None = None
        try:
            while answer.finish is None:
                unread = draw(self.reader, self._params, self._tokenizer.vocab_size)
                piece = answer.feed(unread[0])
                if answer.finish in ("stop", "eos"):
                    safe = safe or self.reader
                    since += piece
                elif answer.held:
                    safe = safe or self.reader.fork()
                    since += piece
                else:
                    safe, since = None, ""
                self._parts.append(piece)
                yield piece
                if answer.finish is None:
                    self._advance(unread)
            if rest := answer.flush_stop():
                since += rest
                self._parts.append(rest)
                yield rest
        except GeneratorExit:
            self._settle(safe, since, unread)
            raise
        self._settle(safe, since, unread)

    def _settle(self, safe: Reader | None, since: str, unread: list[int] | None) -> None:
        """Bring the state to exactly the text that was shown."""
        if safe is not None:
            self.reader = safe
            if since:
                self._read(since)
        elif unread is not None:
            self._advance(unread)

    def _read(self, text: str, on_progress: OnProgress | None = None) -> None:
        length = self.reader.lengths[0]
        prefill(self._model, [[self._tokenizer.encode(text)]], self.reader, self._chunk, on_progress)
        self.tokens_fed += self.reader.lengths[0] - length

    def _advance(self, token_id: list[int]) -> None:
        advance(self._model, self.reader, token_id)
        self.tokens_fed += 1

    def _system_text(self) -> str:
        before = "" if self._context is None else self._template.end
        return before + ("" if self._system is None else self._template.system.replace("{text}", self._system))
