"""A conversation whose state is kept: each turn reads only its new tokens, and the last turns can be taken back."""

from __future__ import annotations

import copy
import time
from array import array
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from samba_lm.errors import UserError
from samba_lm.generation.params import DEFAULT_CHUNK, SamplingParams
from samba_lm.generation.prefill import OnProgress, Reader, prefill
from samba_lm.generation.prompt import TokenIds
from samba_lm.generation.sampling import History, penalised
from samba_lm.generation.stream import Answer, Sampler, Timing, advance, check_request
from samba_lm.model import SambaLM, evaluating
from samba_lm.templates import PROBE, Part, PlainTemplate, Said, Template
from samba_lm.tokenizer import Tokenizer

UNDO_TURNS = 8
"""Turns that can be taken back at most: each holds a state."""
UNDO_BYTES = 1 << 30
"""What these states may take together; the last turn can be taken back always."""


@dataclass(frozen=True)
class Turn:
    """Where a conversation stood before a message. Never changes: forks share it."""

    message: str
    before: Reader
    parts: int
    system_due: bool


class ChatSession:
    """A conversation with a model, in memory that does not grow with it (but for :attr:`text` and its token ids).

    Between turns the state is that of a model which has read exactly :attr:`text`, after its context: neither a stop
    string nor half a character stays in it. (Read anew as a whole, a BPE may cut the same text into other tokens.)

    Args:
        system: what stands before the first message; None: nothing.
        template: how messages are written out; None: plainly, as for base models.
        params: how answers are drawn; what ends an answer by the template is added to its own.
        context: what was read before the conversation, such as ``Snapshot.reader()``; it is copied, never changed.

    Attributes:
        reader: where the conversation stands: the model's state and the number of tokens in it.
        tokens_fed: tokens that went through the model since the start, those later taken back included.
        turns: messages that were answered, those taken back not counted.
        timing: what the last turn cost; ``finish`` is None where the answer was left.

    Raises UserError when the tokenizer does not fit the model, or ``chunk`` is below 1.
    """

    def __init__(
        self,
        model: SambaLM,
        tokenizer: Tokenizer,
        system: str | None = None,
        template: Template | None = None,
        params: SamplingParams | None = None,
        chunk: int = DEFAULT_CHUNK,
        context: Reader | None = None,
    ) -> None:
        check_request(model, tokenizer, chunk)
        self._model = model
        self._tokenizer = tokenizer
        self._system = system
        self._template = template or PlainTemplate(tokenizer)
        self._given = params or SamplingParams()
        self._params = self._with_stops(self._given)
        self._chunk = chunk
        self._context = context
        self._turn: Generator[str, None, None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the context and the system text stay."""
        self.leave()
        self.reader = Reader.create(self._model, self._params, batch=1, context=self._context)
        self._parts: list[str] = []
        self._ids = array("q")
        self._undo: list[Turn] = []
        self._system_due = self._system is not None
        self.tokens_fed = 0
        self.turns = 0
        self.timing = Timing()

    @property
    def text(self) -> str:
        """The conversation so far, exactly as the model has read it."""
        return "".join(self._parts)

    @property
    def token_ids(self) -> TokenIds:
        """The tokens read since the context, int64 [L]."""
        return np.array(self._ids[: self._count()], dtype=np.int64)

    @property
    def params(self) -> SamplingParams:
        """How answers are drawn, from the next one on; set it to change that."""
        return self._given

    @params.setter
    def params(self, params: SamplingParams) -> None:
        self.leave()
        self._given, self._params = params, self._with_stops(params)
        self._fit_history()

    @property
    def system(self) -> str | None:
        """What stands before the first message. Set in a conversation, it stands before the next one."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self.leave()
        self._system, self._system_due = text, text is not None

    def ask(self, message: str, on_progress: OnProgress | None = None) -> Generator[str, None, None]:
        """Read a message and yield the answer in pieces, one a token, some of them empty.

        Closing the generator, or asking again, ends the answer there: what was yielded stays part of the conversation.
        After any error, Ctrl-C included, the conversation is as it was before the message.
        """
        self.leave()
        self._turn = self._take_turn(message, on_progress)
        return self._turn

    def undo(self) -> str:
        """Take the last turn back, and return its message. Raises UserError where its state is not held (any more)."""
        self.leave()
        if not self._undo:
            raise UserError(
                f"Only the last {UNDO_TURNS} turns can be taken back, fewer where states are large: reset starts over."
                if self.turns
                else "There is no turn to take back: say something first."
            )
        turn = self._undo.pop()
        self.reader = turn.before.fork()
        del self._parts[turn.parts :]
        self._system_due = turn.system_due
        self.turns -= 1
        self._fit_history()
        return turn.message

    def fork(self) -> ChatSession:
        """A copy that goes its own way, at the cost of one state."""
        self.leave()
        other = copy.copy(self)
        other.reader = self.reader.fork()
        other._parts, other._ids, other._undo = list(self._parts), self._ids[:], list(self._undo)
        return other

    def begin(self, context: Reader | None, system: str | None) -> ChatSession:
        """A new conversation with the same model and options, after another context."""
        self.leave()
        other = copy.copy(self)
        other._context, other._system = context, system
        other.reset()
        return other

    @torch.inference_mode()
    def resume(self, text: str, on_progress: OnProgress | None = None) -> None:
        """Read the :attr:`text` of an earlier conversation in place of this one, after the context.

        Its system text is taken to be in it. Raises UserError for an empty text; after an error nothing was said.
        """
        if not text:
            raise UserError("The text is empty: there is no conversation in it.")
        self.reset()
        whole = False
        try:
            with evaluating(self._model):
                self._read(self._template.encode_text(text), on_progress)
            self._parts.append(text)
            self._system_due = False
            whole = True
        finally:
            if not whole:
                self.reset()

    def standing(self) -> Reader:
        """A copy of where the conversation stands, to be kept: with all tokens noted, if those of the context were."""
        reader = self.reader.fork()
        known = self._context is None or self._context.history is not None
        reader.history = self._noted() if known else None
        return reader

    def _with_stops(self, params: SamplingParams) -> SamplingParams:
        template = self._template
        return params.replace(stop=(*params.stop, *template.stop), stop_ids=(*params.stop_ids, *template.stop_ids))

    def leave(self) -> None:
        """End the answer that is being made, if one is; what was yielded stays."""
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    def _count(self) -> int:
        """How many tokens were read since the context."""
        return self.reader.lengths[0] - (0 if self._context is None else self._context.lengths[0])

    def _noted(self) -> History:
        """What penalties need to know of all that was read."""
        history = History.create(1, self._model.config.vocab_size, self._model.device)
        if self._context is not None and self._context.history is not None:
            history.seen |= self._context.history.seen
        history.read(0, torch.from_numpy(self.token_ids).to(self._model.device))
        return history

    def _fit_history(self) -> None:
        self.reader.history = self._noted() if penalised(self._params) else None

    @torch.inference_mode()
    def _take_turn(self, message: str, on_progress: OnProgress | None) -> Generator[str, None, None]:
        turn = Turn(message, self.reader.fork(), len(self._parts), self._system_due)
        self.timing = Timing()
        kept = False
        try:
            with evaluating(self._model):
                began, length = time.perf_counter(), self.reader.lengths[0]
                question = self._question(message)
                self._read(self._template.encode_parts(question), on_progress)
                self.timing.prompt_tokens = self.reader.lengths[0] - length
                self._parts.append("".join(part.text for part in question))
                self._system_due = False
                yield from self._answer(began)
            kept = True
        except GeneratorExit:
            kept = True
            raise
        finally:
            if kept:
                self.turns += 1
                self._remember(turn)
            else:
                # The state may be half advanced: some layers have read a token that others have not.
                self.reader = turn.before
                del self._parts[turn.parts :]
                self._system_due = turn.system_due

    def _remember(self, turn: Turn) -> None:
        self._undo.append(turn)
        held = sum(each.before.state.nbytes() for each in self._undo)
        while len(self._undo) > 1 and (len(self._undo) > UNDO_TURNS or held > UNDO_BYTES):
            held -= self._undo.pop(0).before.state.nbytes()

    def _answer(self, began: float) -> Generator[str, None, None]:
        answer = Answer(self._tokenizer, self._params)
        sampler = Sampler(self._params, 1, self._tokenizer, self._model.device)
        if self.reader.history is not None:
            self.reader.history.counts.zero_()  # what was generated in earlier turns is prompt by now
        # Where the conversation stood when all text of its tokens had last been shown, if tokens were read since, and
        # the text shown since; half a stop string or half a character is taken back by returning there.
        safe: Reader | None = None
        since = ""
        unread: list[int] | None = None
        try:
            while answer.finish is None:
                unread = sampler.draw(self.reader)
                piece = answer.feed(unread[0])
                self._note_time(time.perf_counter() - began, answer)
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
                began = time.perf_counter()
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
                self._read(self._tokenizer.encode(since))
        elif unread is not None:
            self._advance(unread)

    def _note_time(self, seconds: float, answer: Answer) -> None:
        if self.timing.new_tokens == 0:
            self.timing.read_seconds = seconds
        else:
            self.timing.decode_seconds += seconds
        self.timing.new_tokens, self.timing.finish = answer.tokens, answer.finish

    def _read(self, ids: TokenIds, on_progress: OnProgress | None = None) -> None:
        length = self.reader.lengths[0]
        del self._ids[self._count() :]  # what was taken back
        prefill(self._model, [[ids]], self.reader, self._chunk, on_progress)
        self._ids.extend(ids.tolist())
        self.tokens_fed += self.reader.lengths[0] - length

    def _advance(self, token_id: list[int]) -> None:
        del self._ids[self._count() :]
        advance(self._model, self.reader, token_id)
        self._ids.append(token_id[0])
        self.tokens_fed += 1

    def _question(self, message: str) -> list[Part]:
        """What is read before an answer to ``message``: after an answer, what the template writes there."""
        said = [Said("system", self._system)] if self._system_due and self._system is not None else []
        said.append(Said("user", message))
        # Base models go on from any text as from an answer; a template that a model was taught by begins anew.
        goes_on = self._context is not None and isinstance(self._template, PlainTemplate)
        if not (self._parts or goes_on):
            return self._template.parts(said)
        parts = self._template.parts([*PROBE, *said])
        return parts[1 + next(i for i, part in enumerate(parts) if part.message == 1) :]
