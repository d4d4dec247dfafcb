"""What every request passes before its handler: is the server open, who asks, how much do they send, how slowly."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from samba_lm.engine.engine import QueueFullError
from samba_lm.serve.auth import Client
from samba_lm.serve.errors import ApiError, api_error, unavailable
from samba_lm.serve.service import Service
from samba_lm.serve.settings import MIB

QUEUED = ("/v1/completions", "/v1/chat/completions", "/v1/contexts")
"""What a full queue refuses before it is read."""


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"] = list(message.get("headers", []))
                headers.append((b"x-content-type-options", b"nosniff"))
            await send(message)

        working = scope["path"].startswith("/v1/") and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        client: Client | None = None
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            _check_host(headers.get("host"), service.settings.allowed_hosts)
            scope.setdefault("state", {})
            if scope["path"].startswith("/v1/") or scope["path"] == "/metrics":
                scope["state"]["client"] = service.keys.check(headers.get("authorization"))
            if working:
                if service.draining:
                    raise unavailable()
                if scope["method"] == "POST" and scope["path"] in QUEUED:
                    service.engine.check_room()
                _check_size(headers.get("content-length"), service.settings.max_body)
                scope["state"]["client"].enter()
                client = scope["state"]["client"]
                service.active += 1
            body = _Body(receive, service.settings.max_body, service.settings.body_seconds)
            service.arriving.add(body.stop)
            try:
                await self._app(scope, body.receive, sending)
            finally:
                service.arriving.discard(body.stop)
        except (ApiError, QueueFullError) as error:
            await api_error(error).response()(scope, receive, sending)
        except Exception:  # answered outside of here
            status = status or 500
            raise
        finally:
            if client is not None:
                client.leave()
                service.active -= 1
            route = scope.get("route")
            path = "other" if route is None else route.path
            service.metrics.requests.labels(path, str(status or 499)).inc()


class _Body:
    """A request's body with limits on its size and on the time it takes."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._most = receive, most
        self._until = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._size, self._whole, self._stopped = 0, False, False
        self._timeout: asyncio.Timeout | None = None

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until) as self._timeout:
                message = await self._receive()
        except TimeoutError:
            if self._stopped:
                raise unavailable() from None
            raise ApiError(408, f"The body did not come within {self._seconds:g} seconds.") from None
        finally:
            self._timeout = None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._most:
                raise _too_large(self._most)
        return message

    def stop(self) -> None:
        """Do not wait for the rest: the server is shutting down."""
        self._stopped = True
        self._until = 0.0
        if self._timeout is not None:
            self._timeout.reschedule(self._until)


def _check_host(host: str | None, allowed: tuple[str, ...] | None) -> None:
    """A page of any site can have its name lead to this machine, and then reads our answers as its own; the browser
    still says that name."""
    if allowed is None or host is None:
        return
    try:
        name = urlsplit(f"//{host}").hostname if "/" not in host else None
    except ValueError:  # brackets that do not close
        name = None
    if name not in allowed:
        raise ApiError(403, f"This server is not called {host[:100]!r}: start it with --allowed-host, if it should be.")


def _check_size(length: str | None, most: int) -> None:
    if length is not None and length.isdecimal() and int(length) > most:
        raise _too_large(most)


def _too_large(most: int) -> ApiError:
    # The connection stays for a while, and what still comes is dropped: a client that is cut off reads no answer.
    return ApiError(413, f"The body is larger than this server's limit of {most / MIB:g} MiB (--max-body).")
