"""One request on its way through the engine: what is still to be read, where it stands, what it has made."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from samba_lm.engine.prefiller import Prefiller
from samba_lm.engine.report import Report
from samba_lm.engine.request import End, Finish, Piece, Progress, Ready, Request, Sink, Token
from samba_lm.errors import UserError
from samba_lm.generation.prefill import Reader, check_ids
from samba_lm.generation.prompt import TokenIds
from samba_lm.generation.sampling import NOT_FINITE, History, bias_of, penalised, require_finite
from samba_lm.generation.stream import Answer
from samba_lm.model import SambaLM
from samba_lm.state import State
from samba_lm.tokenizer import Tokenizer

EMPTY = "The prompt is empty: give at least one token, or a context to go on from."
LOGITS_AT_ONCE = 256
"""Prompt tokens of which all logits are held at once."""
EVERY = 64
"""How often prompts that are read one token a step tell how far they are."""


class Sequence:
    """See the module. All methods but the constructor are called on the engine's thread."""

    def __init__(self, request: Request, tokenizer: Tokenizer, sink: Sink) -> None:
        self.request = request
        self.answer = Answer(tokenizer, request.params)
        self._bias = bias_of(request.params, tokenizer.vocab_size)
        self._guide = None if request.guide is None else request.guide()
        self.cancelled = False
        self.over = False
        self.error: BaseException | None = None
        self.reader: Reader | None = None
        self.has_read = False
        self.unread: deque[int] = deque()
        """Prompt tokens that will be read one a step."""
        self._sink, self._tokenizer = sink, tokenizer
        self._chunks: Iterator[TokenIds] = iter(())
        self._rest: TokenIds | None = None
        self._last: int | None = None
        self._read = 0
        self._prompt: list[Token] = []
        self._times = [time.perf_counter()] * 3  # asked, begun to read, first token

    @property
    def length(self) -> int:
        """Tokens of the sequence: read, and the one made last."""
        assert self.reader is not None
        return self.reader.lengths[0]

    @property
    def biased(self) -> bool:
        """Whether :meth:`bias` has something to say."""
        return self._bias is not None or self._guide is not None

    def bias(self) -> torch.Tensor:
        """What is added to the logits of the next token, fp32 [vocab_size], on the CPU."""
        bias = torch.zeros(self._tokenizer.vocab_size) if self._bias is None else self._bias
        if self._guide is None or self.unread:
            return bias
        try:
            allowed = torch.from_numpy(self._guide.allowed())
            if not allowed.any():
                raise UserError("The answer's grammar allows no token here: it cannot be completed.")
        except UserError as error:
            self.error = error
            return bias
        return bias.masked_fill(~allowed, -torch.inf)

    @property
    def guided(self) -> bool:
        """Whether what :meth:`bias` says depends on the tokens before."""
        return self._guide is not None

    @property
    def penalised(self) -> bool:
        """Whether its row must know which tokens it has read."""
        return penalised(self.request.params)

    @property
    def foreseen(self) -> bool:
        """Whether it will go on after its next token as far as can be known, and that token is all it takes."""
        ending = self.answer.tokens + 1 == self.request.params.max_tokens
        unkept = self.request.keep and self.penalised  # what penalties know is not brought back, see Undo
        return not (ending or self.unread or self._guide is not None or unkept)

    def begin(self, model: SambaLM, one_by_one: bool) -> None:
        """Make the state to begin with."""
        self._times[1:] = [time.perf_counter()] * 2
        request = self.request
        self.reader = Reader.create(model, request.params, 1, request.context)
        self._chunks = iter(request.tokens)
        if one_by_one:
            for chunk in self._chunks:
                check_ids(chunk, model.config.vocab_size, self.length + len(self.unread))
                self.unread.extend(chunk.tolist())
            if not self.unread and self.reader.logits is None:
                raise UserError(EMPTY)
            if self.unread and request.prompt_logprobs:
                if self.reader.logits is None:
                    self._prompt.append(Token(self.unread[0]))
                else:
                    self.note_prompt(self.reader.logits)

    def read(self, model: SambaLM, prefiller: Prefiller, most: int) -> int:
        """Read up to ``most`` tokens of the prompt; how many it were. ``has_read`` tells when it is done."""
        assert self.reader is not None
        chunk = next(self._chunks, None) if self._rest is None else self._rest
        self._rest = None
        if chunk is None:
            self.has_read = True
            if self.reader.logits is None:
                raise UserError(EMPTY)
            return 0
        if chunk.size > most:
            chunk, self._rest = chunk[:most], chunk[most:]
        if chunk.size:
            if self.request.prompt_logprobs:
                for part in np.split(chunk, range(LOGITS_AT_ONCE, chunk.size, LOGITS_AT_ONCE)):
                    self._read_with_logprobs(model, part)
            else:
                prefiller.read(self.reader, chunk)
            self._read += chunk.size
            self._sink(Progress(self._read))
        return int(chunk.size)

    def next_token(self) -> int:
        """The token that its row is to read next; :meth:`advance` tells that it has."""
        if self.unread:
            token = self.unread.popleft()
            self._read += 1
            if self._read % EVERY == 0 or not self.unread:
                self._sink(Progress(self._read))
        else:
            assert self._last is not None
            token = self._last
        return token

    def advance(self) -> None:
        """Its row has read a token."""
        assert self.reader is not None
        self.reader.lengths[0] += 1

    def feed(self, token_id: int, token: Token | None) -> None:
        """Take a token that was drawn. Raises UserError where there was none to draw."""
        if token_id == NOT_FINITE:
            require_finite([token_id])
        if self.answer.tokens == 0 and self._last is None:
            self._times[2] = time.perf_counter()
        before = self.answer.tokens
        text = self.answer.feed(token_id)
        self._last = token_id
        if self.answer.finish is not None:
            text += self.answer.flush()
        elif self._guide is not None:
            self._guide.take(token_id)
        made = (token or Token(token_id),) if self.answer.tokens > before else ()
        if text or made:
            self._sink(Piece(text, made))

    def note_prompt(self, logits: torch.Tensor) -> None:
        """Note how likely the prompt token to be read next is, by logits [1, V]. Raises UserError for no numbers."""
        self._note(logits, torch.tensor([self.unread[0]], device=logits.device))

    def tell_ready(self, reader: Reader) -> None:
        """Hand out where the sequence stands after its prompt, a copy, for others to begin from."""
        self._sink(Ready(reader))

    def settle(self, state: State, history: History | None) -> None:
        """Keep what the sequence's row had."""
        assert self.reader is not None
        self.reader.state, self.reader.history = state, history

    def end(self, finish: Finish, error: BaseException | None = None) -> None:
        """Tell that it is over."""
        self.over = True
        asked, began, first = self._times
        now = time.perf_counter()
        made = self.answer.tokens
        self._sink(
            End(
                finish,
                self._read,
                made,
                error,
                self.reader if self.request.keep and error is None else None,
                self._last,
                tuple(self._prompt),
                waited=began - asked,
                read_seconds=(first if made else now) - began,
                decode_seconds=now - first if made else 0.0,
            )
        )

    def _read_with_logprobs(self, model: SambaLM, chunk: TokenIds) -> None:
        """Read a piece of the prompt and note how likely each of its tokens was."""
        assert self.reader is not None
        reader = self.reader
        check_ids(chunk, model.config.vocab_size, self.length)
        ids = torch.from_numpy(chunk.astype(np.int64)).to(model.device)
        hidden, reader.state = model.features(ids[None], reader.state)
        logits = model.head(hidden[0])
        before = logits[:0] if reader.logits is None else reader.logits
        known = torch.cat((before, logits[:-1]))  # what each token was to be told from; none for the very first
        skipped = len(ids) - len(known)
        self._prompt += [Token(int(token)) for token in chunk[:skipped]]
        self._note(known, ids[skipped:])
        reader.logits = logits[-1:]
        reader.lengths[0] += len(ids)
        if reader.history is not None:
            reader.history.read(0, ids)

    def _note(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        tokens = Report(logits, ids, self.request.logprobs or 0, self._tokenizer.vocab_size).tokens()
        if any(token.logprob is not None and math.isnan(token.logprob) for token in tokens):
            require_finite([NOT_FINITE])
        self._prompt += tokens
