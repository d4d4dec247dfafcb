"""What completions and chat do alike: answers from a job's events, whole or as a stream; ids, reasons."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from samba_lm.engine.request import End, Event, Piece, Token
from samba_lm.serve import sse
from samba_lm.serve.errors import unavailable
from samba_lm.serve.models import StreamOptions, Usage

Reason = Literal["stop", "length"]


@dataclass
class Answer:
    """One text as it was gathered."""

    parts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def reason(self) -> Reason:
        assert self.end is not None
        return reason(self.end)


async def gather(events: AsyncIterator[list[tuple[int, Event]]], count: int) -> Sequence[Answer]:
    """All answers, when all have ended."""
    answers = [Answer() for _ in range(count)]
    async for batch in events:
        for index, event in batch:
            if isinstance(event, Piece):
                answers[index].parts.append(event.text)
                answers[index].tokens += event.tokens
            elif isinstance(event, End):
                answers[index].end = event
                reason(event)
    return answers


async def stream(
    events: AsyncIterator[list[tuple[int, Event]]],
    head: dict[str, Any],
    options: StreamOptions | None,
    first: Iterable[dict[str, Any]],
    show: Callable[[int, Event], dict[str, Any] | None],
    usage: Callable[[int], Usage],
) -> AsyncGenerator[bytes, None]:
    """Answers as server-sent events, each with the ``head`` of all and one choice.

    Args:
        events: an empty list where nothing has come for a while.
        first: choices to begin with.
        show: the choice that tells an event of the answer of this number; None: nobody needs to know of it.
        usage: of so many tokens made.
    """
    counted = options is not None and options.include_usage
    rest = {"usage": None} if counted else {}

    def chunk(choice: dict[str, Any]) -> bytes:
        return sse.data(head | {"choices": [choice]} | rest)

    for choice in first:
        yield chunk(choice)
    made = 0
    async for batch in events:
        out = [] if batch else [sse.KEEP_ALIVE]
        for index, event in batch:
            shown = show(index, event)
            if shown is not None:
                out.append(chunk(shown))
            if isinstance(event, End):
                made += event.new_tokens
        if out:
            yield b"".join(out)
    if counted:
        yield sse.data(head | {"choices": [], "usage": usage(made).model_dump()})
    yield sse.DONE


def reason(end: End) -> Reason:
    """Why a text ended, in OpenAI's words. Raises ApiError where the server stopped it."""
    if end.finish == "cancelled":
        raise unavailable()
    return "length" if end.finish == "length" else "stop"


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
