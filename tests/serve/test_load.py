"""Many clients at once: all streams come, in order and whole; a crowd beyond the queue is told so at once."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import pytest
from serving import Server, Start, wait_until

STREAM = {"prompt": "the sea", "max_tokens": 40, "stream": True, "ignore_eos": True, "temperature": 0}


async def post(server: Server, body: dict[str, object]) -> tuple[int, str, float]:
    """Status, body and seconds of one request on a connection of its own."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        answer = (await reader.read(-1)).decode()
    finally:
        writer.close()
        await writer.wait_closed()
    return int(answer.split(" ", 2)[1]), answer, time.perf_counter() - began


def streams_for(server: Server, streams: int, seconds: float) -> int:
    """Keep so many streams open; how many were read to their ends. All must be right."""
    until = time.monotonic() + seconds

    async def client(seed: int) -> int:
        count = 0
        while time.monotonic() < until or not count:
            status, answer, _ = await post(server, STREAM | {"seed": seed})
            assert status == 200, answer[:500]
            assert '"finish_reason":"length"' in answer
            assert "data: [DONE]" in answer
            assert '"error"' not in answer
            count += 1
        return count

    async def all_clients() -> int:
        return sum(await asyncio.gather(*(client(seed) for seed in range(streams))))

    return asyncio.run(all_clients())


def test_64_streams(start: Start) -> None:
    server = start("--slots", "64")
    assert streams_for(server, 64, 2) >= 64
    assert wait_until(lambda: server.gauge("samba_running") == 0, 10)
    assert server.gauge("samba_sequences_total") * 40 == server.gauge("samba_generated_tokens_total")


@pytest.mark.slow
def test_64_streams_for_a_minute(start: Start) -> None:
    assert streams_for(start("--slots", "64"), 64, 60) > 64


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_for_ten_minutes(start: Start) -> None:
    """Streams, chats and contexts that come and go."""
    server = start("--slots", "16", "--cache", "1", "--context-memory", "16")

    def resident() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]

    def work(seconds: float) -> None:
        until = time.monotonic() + seconds
        turn = 0
        while time.monotonic() < until:
            assert streams_for(server, 16, 2) > 0
            for _ in range(20):
                turn += 1
                body = {"messages": [{"role": "user", "content": f"{turn} {'hi ' * 50}"}], "max_tokens": 8}
                assert server.ask("POST", "/v1/chat/completions", body)[0] == 200
                _, made = server.ask("POST", "/v1/contexts", {"text": f"{turn} {'text ' * 200}"})
                assert server.ask("DELETE", f"/v1/contexts/{made['id']}")[0] == 200

    work(60)
    before = resident()
    work(540)
    assert resident() < before + 20_000, (before, resident())


def test_a_crowd_beyond_the_queue_is_told_at_once(start: Start) -> None:
    server = start("--slots", "2", "--queue", "2", "--max-tokens", "10000000")
    endless = STREAM | {"max_tokens": 10_000_000}

    async def crowd() -> list[tuple[int, str, float]]:
        held = [asyncio.create_task(post(server, endless)) for _ in range(4)]
        while await asyncio.to_thread(server.gauge, "samba_waiting") < 2:
            await asyncio.sleep(0.05)
        answers = await asyncio.gather(*(post(server, STREAM) for _ in range(1000)))
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        return answers

    answers = asyncio.run(crowd())
    assert {status for status, _, _ in answers} == {429}
    assert all("retry-after: 1" in answer.lower() for _, answer, _ in answers)
    print(f"the slowest of 1,000 was told after {max(seconds for _, _, seconds in answers):.2f} s")
    assert max(seconds for _, _, seconds in answers) < 20  # one core may be shared; `bench serve` measures
    assert wait_until(lambda: server.gauge("samba_running") + server.gauge("samba_waiting") == 0, 10)
