"""Events while nothing happens, and places in the queue of requests with several texts."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import AsyncGenerator, Iterator

import numpy as np
import pytest
import uvicorn
from serving import make_model, wait_until
from starlette.types import Receive, Scope, Send

from samba_lm.engine.engine import Engine, QueueFullError
from samba_lm.engine.request import End, Piece, Request
from samba_lm.generation.params import SamplingParams
from samba_lm.serve import sse
from samba_lm.serve.auth import Keys
from samba_lm.serve.completions import Completions, read_prompts
from samba_lm.serve.jobs import Job
from samba_lm.serve.models import CompletionRequest
from samba_lm.serve.server import PatientProtocol, listen
from samba_lm.serve.service import Service
from samba_lm.serve.settings import Settings
from samba_lm.serve.stores import MemoryStore
from samba_lm.templates import PlainTemplate
from samba_lm.tokenizer import ByteTokenizer

ENDLESS = Request([np.array([65])], SamplingParams(max_tokens=None, stop_at_eos=False))
TOKENIZER = ByteTokenizer()


@pytest.fixture
def service() -> Iterator[Service]:
    with Engine(make_model(), TOKENIZER, slots=1, queue_limit=1) as engine:
        settings = Settings("tiny", keep_alive_seconds=0.05)
        yield Service(engine, settings, Keys(), PlainTemplate(TOKENIZER), MemoryStore(0))


def test_a_stream_that_waits_says_that_it_lives(service: Service) -> None:
    async def run() -> list[bytes]:
        cancel = service.engine.submit(ENDLESS, lambda _: None)
        request = CompletionRequest(prompt="a", max_tokens=3, ignore_eos=True)
        job = Completions(service, request, read_prompts(service, request, None), None)
        pieces = []
        async for piece in job.stream():
            pieces.append(piece)
            if len(pieces) == 3:
                cancel()
        return pieces

    pieces = asyncio.run(run())
    assert pieces[:3] == [sse.KEEP_ALIVE] * 3
    assert pieces[-1] == sse.DONE
    assert b'"finish_reason":"length"' in b"".join(pieces)


def test_many_texts_take_one_place_after_the_other(service: Service) -> None:
    """More prompts than the engine has room for are a request like any other, in a queue that others use too."""

    async def count(job: Job) -> tuple[int, int]:
        tokens = ends = 0
        async for batch in job.events():
            tokens += sum(len(event.tokens) for _, event in batch if isinstance(event, Piece))
            ends += sum(isinstance(event, End) for _, event in batch)
        return tokens, ends

    async def run() -> list[tuple[int, int]]:
        prompts = [Request([np.array([65, i])], SamplingParams(max_tokens=5, stop_at_eos=False)) for i in range(20)]
        first = Job(service.bridge, prompts)
        with pytest.raises(QueueFullError):
            Job(service.bridge, prompts[:1])
        running = asyncio.create_task(count(first))
        await asyncio.sleep(0.05)
        return [await running, await count(Job(service.bridge, prompts[:3], copies=4))]

    assert asyncio.run(run()) == [(100, 20), (60, 12)]


def test_a_job_that_was_closed_leaves_nothing_behind(service: Service) -> None:
    def running() -> int:
        return service.engine.counts()["running"]

    async def run() -> None:
        job = Job(service.bridge, [ENDLESS])
        assert await asyncio.to_thread(wait_until, lambda: running() == 1, 30)
        job.close()
        assert await asyncio.to_thread(wait_until, lambda: not running(), 1), "it still runs"

    asyncio.run(run())


def test_who_leaves_as_a_token_comes_is_left(service: Service) -> None:
    """Python 3.11's ``asyncio.wait_for`` loses a cancellation that comes together with what it waits for."""

    async def run() -> None:
        cancel = service.engine.submit(ENDLESS, lambda _: None)  # has the slot: nothing comes by itself
        job = Job(service.bridge, [ENDLESS])

        async def read() -> None:
            async for _ in job.events(patience=60):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        job.take(0, Piece("a", ()))
        reading.cancel()
        await asyncio.wait({reading}, timeout=5)
        cancel()
        assert reading.cancelled()

    asyncio.run(run())


def test_who_does_not_read_is_left() -> None:
    """Who reads slowly is not."""

    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            await asyncio.sleep(0)
            yield b"x" * 65536

    async def run() -> None:
        left = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await sse.EventStream(endless(), left.set)(scope, receive, send)

        listener = listen("127.0.0.1", 0)
        protocol = functools.partial(PatientProtocol, 10.0, 0.3)
        server = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="off", log_config=None))
        running = asyncio.create_task(server.serve([listener]))
        for slowly in (True, False):
            left.clear()
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                for _ in range(15 * slowly):
                    await asyncio.sleep(0.05)
                    await asyncio.to_thread(client.recv, 1 << 20)
                assert not left.is_set()
                if not slowly:
                    await left.wait()
            await left.wait()
        server.should_exit = True
        await running

    asyncio.run(asyncio.wait_for(run(), 20))
