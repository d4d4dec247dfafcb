"""``POST /v1/chat/completions``: conversations."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import numpy as np
import torch

from samba_lm.engine.request import End, Event, Piece, Ready, Request, Token
from samba_lm.generation.prefill import Reader
from samba_lm.generation.prompt import TokenIds
from samba_lm.generation.sampling import History
from samba_lm.serve import models
from samba_lm.serve.answers import Answer, gather, new_id, reason, stream
from samba_lm.serve.contexts import Context
from samba_lm.serve.errors import ApiError
from samba_lm.serve.jobs import Job
from samba_lm.serve.models import ChatChoice, ChatCompletion, ChatLogprobs, ChatRequest, ChatToken, Likely
from samba_lm.serve.schema import Grammar
from samba_lm.serve.service import Service


class Chat:
    """One request on its way. Made, it is in the engine's queue; raises what refuses it."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        prompt: TokenIds,
        context: Context | None,
        grammar: Grammar | None,
        owner: str,
    ) -> None:
        self._service, self._request, self._prompt = service, request, prompt
        most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        params = service.params(request, most, service.settings.max_tokens)
        if grammar is None:
            template = service.template
            params = params.replace(
                stop=(*params.stop, *template.stop), stop_ids=(*params.stop_ids, *template.stop_ids)
            )
        else:
            params = params.replace(stop_at_eos=True)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        service.check_length(prompt)
        self._copies = request.n or 1
        self._before = 0 if context is None else context.tokens
        # Clients never meet in it, and neither do conversations after different contexts.
        self._root = f"{owner}/{'' if context is None else context.id}"
        turn = service.turns.find(self._root, prompt)
        begin = None if context is None else context.reader()
        if turn is not None:
            begin = Reader(turn.reader.state, turn.reader.lengths, None, self._history(prompt[: turn.length], begin))
        self._cached = self._before + (0 if turn is None else turn.length)
        self._head: dict[str, Any] = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        service.metrics.cached_tokens.inc(self._cached)
        asked = Request(
            (prompt if turn is None else prompt[turn.length :],),
            params,
            begin,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            guide=None if grammar is None else grammar.guide,
            keep=self._copies == 1 and service.settings.cache_bytes > 0,
            keep_prompt=service.settings.cache_bytes > 0,
        )
        self._made: list[int] = []
        self._job = Job(service.bridge, [asked], self._copies)

    def _history(self, read: TokenIds, context: Reader | None) -> History | None:
        """What a repetition penalty must know of what is not read again."""
        if self._request.repetition_penalty in (None, 1):
            return None
        model = self._service.engine.model
        history = History.create(1, model.config.vocab_size, model.device)
        history.read(0, torch.from_numpy(read).to(model.device))
        if context is not None and context.history is not None:
            history.seen |= context.history.seen
        return history

    async def _events(self, patience: float | None = None) -> AsyncGenerator[list[tuple[int, Event]], None]:
        """The job's events; what they tell of the conversation's state is kept on the way."""
        async for batch in self._job.events(patience):
            for _, event in batch:
                if isinstance(event, Ready):
                    self._service.turns.put(self._root, self._prompt, event.reader)
                elif isinstance(event, Piece) and self._copies == 1:
                    self._made += [token.id for token in event.tokens]
                elif isinstance(event, End) and event.reader is not None and event.finish != "cancelled":
                    # The token made last has not been read.
                    whole = np.concatenate([self._prompt, np.array(self._made, dtype=np.int64)])
                    read = whole[: event.reader.lengths[0] - self._before]
                    self._service.turns.put(self._root, read, event.reader)
            yield batch

    async def whole(self) -> ChatCompletion:
        """The answer, when it is complete."""
        answers = await gather(self._events(), self._copies)
        made = sum(answer.end.new_tokens for answer in answers if answer.end is not None)
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return ChatCompletion(**self._head, choices=choices, usage=self._usage(made))

    def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as events."""

        def choice(index: int, delta: dict[str, Any], logprobs: Any = None, why: str | None = None) -> dict[str, Any]:
            return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": why}

        def show(index: int, event: Event) -> dict[str, Any] | None:
            if isinstance(event, Piece):
                logprobs = self._logprobs(event.tokens)
                if event.text or logprobs is not None:
                    return choice(index, {"content": event.text}, logprobs and logprobs.model_dump())
            return choice(index, {}, why=reason(event)) if isinstance(event, End) else None

        return stream(
            self._events(self._service.settings.keep_alive_seconds),
            self._head | {"object": "chat.completion.chunk"},
            self._request.stream_options,
            [choice(i, {"role": "assistant", "content": ""}) for i in range(self._copies)],
            show,
            self._usage,
        )

    def close(self) -> None:
        """Cancel what still runs."""
        self._job.close()

    def _usage(self, made: int) -> models.Usage:
        return self._service.usage(self._prompt.size + self._before, made, self._cached)

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        message = models.Answer(content=answer.text)
        logprobs = self._logprobs(answer.tokens)
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=answer.reason)

    def _logprobs(self, tokens: Iterable[Token]) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        shown = []
        for token in tokens:
            assert token.logprob is not None
            top = [self._likely(*one) for one in token.top]
            own = self._likely(token.id, token.logprob)
            shown.append(ChatToken(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
        return ChatLogprobs(content=shown)

    def _likely(self, token_id: int, logprob: float) -> Likely:
        words = self._service.words
        return Likely(token=words.text(token_id), logprob=logprob, bytes=list(words.bytes(token_id)))
