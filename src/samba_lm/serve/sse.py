"""Server-sent events: a response that is written as its events come, and ends its work when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from samba_lm.errors import UserError
from samba_lm.serve.errors import ApiError, api_error

T = TypeVar("T")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Pieces = AsyncGenerator[bytes, None]
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def data(message: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


class EventStream(Response):
    """Sends pieces of an event stream as they come, and calls ``close`` at the end in any case.

    An error after the first piece becomes an event ``{"error": ...}`` and ends the stream without ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: Pieces, close: Callable[[], None]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._pieces, self._close = pieces, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with contextlib.suppress(ClientGone):
                await until_gone(receive, self._send_all(send))
        finally:
            self._close()  # the pieces may never have been begun

    async def _send_all(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (UserError, ApiError) as error:
            told = api_error(error)
            await send({"type": "http.response.body", "body": data(told.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientGone(Exception):  # noqa: N818 - not an error
    """The client did not wait for the answer."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or cancel it when the client disconnects (ClientGone). The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """:func:`until_gone` for a handler."""
    return await until_gone(request.receive, work)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
