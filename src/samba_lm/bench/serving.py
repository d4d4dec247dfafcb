"""A server under load, seen by its clients: time to the first token, time between tokens, what a crowd is told.

Imports nothing of the server: any that speaks OpenAI's protocol can be measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from samba_lm.errors import UserError

HOLD_TOKENS = 4096
"""Of the texts that fill a server before a crowd comes; what `samba-lm serve` allows unless told otherwise."""
OFTEN = (50, 99)
"""Percentiles that are told."""


@dataclass
class Load:
    """What clients saw. Times in seconds."""

    streams: int
    seconds: float = 0.0
    finished: int = 0
    """Texts that came whole: as many tokens as were asked for, and the end's mark."""
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """From the request to its first token."""
    between: list[float] = field(default_factory=list)
    """From a token to the next."""

    def record(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "streams": self.streams,
            "seconds": self.seconds,
            "finished": self.finished,
            "errors": len(self.errors),
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "first_token": percentiles(self.first),
            "between_tokens": percentiles(self.between),
        }


@dataclass
class Crowd:
    """What clients were told who came when the queue was full. Seconds from the connection to the answer's end."""

    statuses: dict[int, int]
    seconds: list[float]

    def record(self) -> dict[str, object]:
        """For ``--json``."""
        return {"statuses": self.statuses, "seconds": percentiles(self.seconds)}


@dataclass(frozen=True)
class Target:
    """A server and what it is asked for."""

    url: str
    """Such as ``http://127.0.0.1:8000``; no TLS."""
    key: str | None = None
    prompt: str = "The sea is salt, and "
    max_tokens: int = 128

    def address(self) -> tuple[str, int]:
        """Host and port. Raises UserError for what is no URL of a server without TLS."""
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host, port = None, 0
        if host is None or parts.scheme != "http":
            raise UserError(f"{self.url!r} is no server's address: give one such as http://127.0.0.1:8000.")
        return host, port

    def request(self, max_tokens: int) -> bytes:
        """One request for a stream, as it goes over the wire."""
        host, port = self.address()
        body: dict[str, Any] = {
            "prompt": self.prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        data = json.dumps(body).encode()
        key = "" if self.key is None else f"Authorization: Bearer {self.key}\r\n"
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the largest, in seconds."""
    if not seconds:
        return {}
    found = {f"p{q}": float(np.percentile(seconds, q)) for q in OFTEN}
    return {**found, "max": max(seconds)}


async def measure_streams(target: Target, streams: int, seconds: float) -> Load:
    """Keep so many streams open for so long, each followed by another until the time is over.

    Raises UserError where the server cannot be reached.
    """
    load = Load(streams)
    began = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() < began + seconds:
            await _stream(target, load)

    await asyncio.gather(*(client() for _ in range(streams)))
    load.seconds = time.perf_counter() - began
    return load


async def measure_crowd(target: Target, count: int, hold: int) -> Crowd:
    """Fill the server with ``hold`` texts, then let so many clients come at once.

    Raises UserError where the server cannot be reached.
    """
    held = [await _open(target) for _ in range(hold)]
    try:
        for _, writer in held:
            writer.write(target.request(HOLD_TOKENS))
        await asyncio.sleep(1)  # all of them are in the queue by then
        answers = await asyncio.gather(*(_told(target) for _ in range(count)))
    finally:
        for _, writer in held:
            writer.close()
    statuses: dict[int, int] = {}
    for status, _ in answers:
        statuses[status] = statuses.get(status, 0) + 1
    return Crowd(statuses, [seconds for _, seconds in answers])


async def _open(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = target.address()
    try:
        return await asyncio.open_connection(host, port)
    except OSError as error:
        raise UserError(f"No server answers at {target.url} ({error.strerror or error}): start it first.") from None


async def _told(target: Target) -> tuple[int, float]:
    began = time.perf_counter()
    reader, writer = await _open(target)
    try:
        writer.write(target.request(1))
        status = int((await reader.readline()).split()[1])
        await reader.read(-1)
    except (ConnectionError, IndexError):
        status = 0
    finally:
        writer.close()
    return status, time.perf_counter() - began


async def _stream(target: Target, load: Load) -> None:
    """One text: note when each token comes."""
    began = last = time.perf_counter()
    reader, writer = await _open(target)
    count, whole = 0, False
    try:
        writer.write(target.request(target.max_tokens))
        status = (await reader.readline()).decode("latin-1").split(" ", 2)
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif b'"finish_reason":null' in line:  # ours: an event a token
                now = time.perf_counter()
                (load.between if count else load.first).append(now - last)
                last, count = now, count + 1
        if status[1] != "200" or not whole or count != target.max_tokens:
            load.errors.append(f"status {status[1]}, {count} of {target.max_tokens} tokens")
            await asyncio.sleep(0.1)
        else:
            load.finished += 1
            load.tokens += count
    except (ConnectionError, IndexError) as error:
        load.errors.append(f"after {time.perf_counter() - began:.1f} s: {error}")
        await asyncio.sleep(0.1)
    finally:
        writer.close()
