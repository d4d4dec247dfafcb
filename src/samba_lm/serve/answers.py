"""What completions and chat do alike: whole answers from a job's events, ids, reasons."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from samba_lm.engine.request import End, Event, Piece, Token
from samba_lm.serve.errors import unavailable

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


def reason(end: End) -> Reason:
    """Why a text ended, in OpenAI's words. Raises ApiError where the server stopped it."""
    if end.finish == "cancelled":
        raise unavailable()
    return "length" if end.finish == "length" else "stop"


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
