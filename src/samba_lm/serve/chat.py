"""``POST /v1/chat/completions``: conversations."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from samba_lm.engine.request import End, Piece, Request, Token
from samba_lm.generation.prompt import TokenIds
from samba_lm.serve import models, sse
from samba_lm.serve.answers import Answer, gather, new_id, reason
from samba_lm.serve.contexts import Context
from samba_lm.serve.errors import ApiError
from samba_lm.serve.jobs import Job
from samba_lm.serve.models import ChatChoice, ChatCompletion, ChatLogprobs, ChatRequest, ChatToken, Likely
from samba_lm.serve.service import Service


class Chat:
    """One request on its way. Made, it is in the engine's queue; raises what refuses it."""

    def __init__(self, service: Service, request: ChatRequest, prompt: TokenIds, context: Context | None) -> None:
        self._service, self._request, self._prompt = service, request, prompt
        most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        params = service.params(request, most, service.settings.max_tokens)
        params = params.replace(stop=(*params.stop, *service.template.stop))
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        service.check_length(prompt)
        self._copies = request.n or 1
        self._cached = 0 if context is None else context.tokens
        self._head: dict[str, Any] = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        service.metrics.cached_tokens.inc(self._cached)
        asked = Request(
            (prompt,),
            params,
            None if context is None else context.reader,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        self._job = Job(service.bridge, [asked], self._copies)

    async def whole(self) -> ChatCompletion:
        """The answer, when it is complete."""
        answers = await gather(self._job, self._copies)
        made = sum(answer.end.new_tokens for answer in answers if answer.end is not None)
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return ChatCompletion(**self._head, choices=choices, usage=self._usage(made))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        head = self._head | {"object": "chat.completion.chunk"}
        options = self._request.stream_options
        usage = options is not None and options.include_usage
        rest = {"usage": None} if usage else {}

        def chunk(index: int, delta: dict[str, Any], why: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": why}
            return sse.data(head | {"choices": [choice]} | rest)

        yield b"".join(chunk(i, {"role": "assistant", "content": ""}) for i in range(self._copies))
        made = 0
        async for batch in self._job.events(self._service.settings.keep_alive_seconds):
            out = [] if batch else [sse.KEEP_ALIVE]
            for index, event in batch:
                if isinstance(event, Piece):
                    logprobs = self._logprobs(event.tokens)
                    if event.text or logprobs is not None:
                        out.append(chunk(index, {"content": event.text}, None, logprobs and logprobs.model_dump()))
                elif isinstance(event, End):
                    out.append(chunk(index, {}, reason(event)))
                    made += event.new_tokens
            if out:
                yield b"".join(out)
        if usage:
            yield sse.data(head | {"choices": [], "usage": self._usage(made).model_dump()})
        yield sse.DONE

    def close(self) -> None:
        """Cancel what still runs."""
        self._job.close()

    def _usage(self, made: int) -> models.Usage:
        return self._service.usage(self._prompt.size + self._cached, made, self._cached)

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
