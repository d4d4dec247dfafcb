"""Running the application: a real socket, patience with slow clients, and a shutdown that finishes what it began."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from samba_lm.errors import UserError
from samba_lm.serve.errors import ApiError
from samba_lm.serve.service import Service

BACKLOG = 2048
IDLE_SECONDS = 30
"""A connection without a request is closed after so long."""
SWITCH_SECONDS = 0.001
"""How long a thread may keep the others waiting for Python: the engine's makes the tokens that the loop's sends."""
READ_AT_LEAST = 8192
"""Bytes of an answer that a client must read within ``Settings.reading_seconds`` where more wait for it."""
LAST_SECONDS = 3
"""What is left after the drain has so long to tell its client."""
LINGER_SECONDS = 2
"""A client that still sends when its answer is complete has so long to read that answer."""


def serve(app: FastAPI, service: Service) -> None:
    """Answer requests until the process is told to stop (SIGTERM or SIGINT; a second one stops at once).

    Raises UserError where the address cannot be listened at.
    """
    settings = service.settings
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = listen(settings.host, settings.port)
    config = uvicorn.Config(
        app,
        http=functools.partial(PatientProtocol, settings.header_seconds, settings.reading_seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    logger = logging.getLogger("uvicorn.error")
    logger.setLevel(logging.ERROR)
    logger.addFilter(_worth_telling)
    _Server(config, service).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError for an address that is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot listen at {host}, port {port} ({reason}): choose another --port (0: any) or --host."
        ) from None


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not that a request was cut off by the shutdown: its client did not read what it was told."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Server(uvicorn.Server):
    """Told to stop, it refuses new work with 503, lets what runs go on for a while, cancels the rest, and ends."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(
            f"samba-lm: serving {self._service.settings.model_name} at http://{host}:{port}",
            file=sys.stderr,
            flush=True,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        service = self._service
        until = self._loop.time() + service.settings.drain_seconds
        if service.active:
            print(
                f"samba-lm: stopping: {service.active} requests may go on for {service.settings.drain_seconds:g} s "
                "(again to stop at once)",
                file=sys.stderr,
                flush=True,
            )
        while service.active and self._loop.time() < until and not self.should_exit:
            await asyncio.sleep(0.05)
        service.stop()
        until = self._loop.time() + LAST_SECONDS
        while service.active and self._loop.time() < until and not self.should_exit:
            await asyncio.sleep(0.02)
        self.should_exit = True


class LingeringTransport:
    """A connection that, closed while the client still sends, says that no more will come and drops what does.

    Closed at once with bytes unread, it would be reset, and the client would lose the answer that tells it why.
    """

    def __init__(self, transport: asyncio.Transport, client_sends: Callable[[], bool]) -> None:
        self._transport, self._client_sends = transport, client_sends
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self._client_sends():
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that waits for a request's head, and for the rest of a refused body, only so long; and for a client
    that does not read its answer, which would be held in memory for as long as it likes."""

    def __init__(self, seconds: float, reading_seconds: float, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seconds, self._reading_seconds = seconds, reading_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(LingeringTransport(transport, self._client_sends))  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._end(400, "This is no HTTP request that can be understood: its head or its chunks are malformed.")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unset_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset()
        self._unset_unread()
        super().connection_lost(exc)

    def _client_sends(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])

    def _watch(self) -> None:
        answered = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if not (self.conn.their_state is h11.IDLE or answered) or self.transport.is_closing():
            self._unset()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._seconds, self._too_slow)

    def _unset(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_reading(self, before: float = math.inf) -> None:
        """Cut the client off unless it has read something since ``before`` waited for it; else look again later."""
        waits = self.transport.get_write_buffer_size()
        if waits <= before - READ_AT_LEAST:
            self._unread = self.loop.call_later(self._reading_seconds, self._watch_reading, waits)
        else:
            self.transport.abort()

    def _unset_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._end(408, f"The request's head did not come within {self._seconds:g} s.")
        else:
            self.transport.close()

    def _end(self, status: int, message: str) -> None:
        """Answer what never became a request, unless an answer has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(status, message).body()).encode()
            headers = [("content-type", "application/json"), ("connection", "close")]
            events = (
                h11.Response(status_code=status, headers=[*headers, ("content-length", str(len(body)))]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self.cycle is not None and not self.cycle.response_complete:
            # As when the connection is lost, which is later where it lingers: nothing more may be written.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
