"""``POST /v1/completions``: texts and token ids continued as they are."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from samba_lm.engine.request import End, Event, Piece, Request, Token
from samba_lm.generation.prompt import TokenIds, prompt_chunks
from samba_lm.serve.answers import Answer, gather, new_id, reason, stream
from samba_lm.serve.contexts import Context
from samba_lm.serve.errors import ApiError
from samba_lm.serve.jobs import Job
from samba_lm.serve.models import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from samba_lm.serve.service import Service
from samba_lm.serve.words import Words

DEFAULT_MAX_TOKENS = 16
MOST_LOGPROBS = 500_000
"""Log-probabilities of one answer: some 10 MiB of JSON."""


@dataclass
class Prompts:
    """What a request wants continued: token ids, and the texts that ``echo`` shows."""

    ids: list[TokenIds]
    texts: list[str]


def read_prompts(service: Service, request: CompletionRequest, context: Context | None) -> Prompts:
    """The prompts of a request, within the limits. Raises ApiError or UserError for those that are not."""
    given = request.prompt
    several: list[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    most = service.settings.max_prompts
    if len(several) > most:
        raise ApiError(400, f"{len(several)} prompts are above this server's limit of {most}.", param="prompt")
    prompts = Prompts([], [])
    tokenizer = service.engine.tokenizer
    for one in several:
        ids = tokenizer.encode(one) if isinstance(one, str) else service.token_ids(one)
        if not ids.size and context is None:
            ids = next(prompt_chunks("", tokenizer))
        service.check_length(ids)
        prompts.ids.append(ids)
        if request.echo:
            prompts.texts.append(one if isinstance(one, str) else tokenizer.decode(ids))
    return prompts


class Completions:
    """One request on its way. Made, it is in the engine's queue; raises what refuses it."""

    def __init__(self, service: Service, request: CompletionRequest, prompts: Prompts, context: Context | None) -> None:
        self._service, self._request, self._prompts = service, request, prompts
        params = service.params(request, request.max_tokens, DEFAULT_MAX_TOKENS)
        self._copies = request.n or 1
        self._count = self._copies * len(prompts.ids)
        if request.stream and request.echo and request.logprobs is not None:
            raise ApiError(400, "echo with logprobs cannot be streamed: leave one of the three out.", param="stream")
        if request.logprobs is not None:
            shown = sum(ids.size for ids in prompts.ids) * self._copies if request.echo else 0
            shown += (params.max_tokens or 0) * len(prompts.ids) * self._copies
            if shown * (1 + request.logprobs) > MOST_LOGPROBS:
                raise ApiError(
                    400,
                    f"This asks for {shown * (1 + request.logprobs):,} log-probabilities, the limit is "
                    f"{MOST_LOGPROBS:,}: ask for fewer tokens, copies or prompts at once.",
                    param="logprobs",
                )
        requests = [
            Request(
                (ids,) if ids.size else (),
                params,
                None if context is None else context.reader(),
                logprobs=request.logprobs,
                prompt_logprobs=bool(request.echo) and request.logprobs is not None,
            )
            for ids in prompts.ids
        ]
        self._read = sum(ids.size for ids in prompts.ids)
        self._cached = 0 if context is None else context.tokens * len(prompts.ids)
        self._head: dict[str, Any] = {
            "id": new_id("cmpl"),
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        service.metrics.cached_tokens.inc(self._cached)
        self._job = Job(service.bridge, requests, self._copies)

    async def whole(self) -> Completion:
        """The answer, when it is complete."""
        answers = await gather(self._job.events(), self._count)
        first = [answers[i - i % self._copies] for i in range(self._count)]  # it has read the prompt
        # A list of log-probabilities may be long: meanwhile the loop serves others.
        choices = await asyncio.to_thread(lambda: [self._choice(i, answers[i], first[i]) for i in range(self._count)])
        made = sum(answer.end.new_tokens for answer in answers if answer.end is not None)
        return Completion(**self._head, choices=choices, usage=self._usage(made))

    def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        asked = self._request
        texts = [self._prompts.texts[i // self._copies] if asked.echo else "" for i in range(self._count)]
        places = [Place(len(text)) for text in texts]

        def choice(index: int, text: str, logprobs: Any = None, why: str | None = None) -> dict[str, Any]:
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": why}

        def show(index: int, event: Event) -> dict[str, Any] | None:
            if isinstance(event, Piece):
                shown = None if asked.logprobs is None else self._logprobs(event.tokens, places[index]).model_dump()
                return choice(index, event.text, shown)
            return choice(index, "", why=reason(event)) if isinstance(event, End) else None

        return stream(
            self._job.events(self._service.settings.keep_alive_seconds),
            self._head | {"object": "text_completion"},
            asked.stream_options,
            (choice(i, text) for i, text in enumerate(texts) if asked.echo),
            show,
            self._usage,
        )

    def close(self) -> None:
        """Cancel what still runs."""
        self._job.close()

    def _usage(self, made: int) -> Usage:
        return self._service.usage(self._read + self._cached, made, self._cached)

    def _choice(self, index: int, answer: Answer, first: Answer) -> CompletionChoice:
        echo = self._prompts.texts[index // self._copies] if self._request.echo else ""
        logprobs = None
        if self._request.logprobs is not None:
            prompt = first.end.prompt if first.end is not None else ()
            logprobs = self._logprobs((*prompt, *answer.tokens), Place())
        return CompletionChoice(index=index, text=echo + answer.text, logprobs=logprobs, finish_reason=answer.reason)

    def _logprobs(self, tokens: tuple[Token, ...], place: Place) -> CompletionLogprobs:
        words = self._service.words
        shown = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            shown.tokens.append(words.text(token.id))
            shown.token_logprobs.append(token.logprob)
            shown.top_logprobs.append(None if token.logprob is None else top(token, words))
            shown.text_offset.append(place.offset)
            place.pass_by(words.bytes(token.id))
        return shown


class Place:
    """Where in the text the next token begins: a character that is cut into tokens counts when it is complete."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def pass_by(self, token: bytes) -> None:
        """Go on behind a token."""
        self.offset += len(self._decoder.decode(token))


def top(token: Token, words: Words) -> dict[str, float]:
    """The likeliest tokens by their texts; of two with the same text, the likelier."""
    found: dict[str, float] = {}
    for token_id, logprob in token.top:
        found.setdefault(words.text(token_id), logprob)
    return found
