"""Told to stop, a server refuses what comes, finishes what runs, and never ends in the middle without a word."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from typing import Any

from serving import Server, Start, wait_until

LONG = {"prompt": "a", "max_tokens": 4096, "temperature": 0, "ignore_eos": True}


class Asking(threading.Thread):
    """A request that goes on beside the test."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__()
        self._server, self._body = server, body
        self.answer: tuple[int, Any] = (0, None)
        self.start()

    def run(self) -> None:
        self.answer = self._server.ask("POST", "/v1/completions", self._body)


def test_what_runs_is_finished_and_new_work_refused(start: Start) -> None:
    server = start()
    long = LONG | {"max_tokens": 300}
    whole, streamed = Asking(server, long), Asking(server, long | {"stream": True})
    waiting = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    waiting.connect()
    assert wait_until(lambda: server.gauge("samba_running") == 2, 10)
    server.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: server.ask("GET", "/health")[0] == 503, 10)
    assert server.ask("GET", "/health")[1]["status"] == "stopping"
    waiting.request("POST", "/v1/completions", json.dumps(long), {"Content-Type": "application/json"})
    refused = waiting.getresponse()
    assert (refused.status, refused.getheader("retry-after")) == (503, "1")
    assert json.loads(refused.read())["error"]["code"] == "shutting_down"
    waiting.close()
    whole.join()
    streamed.join()
    assert whole.answer[0] == 200
    assert whole.answer[1]["usage"]["completion_tokens"] == 300
    assert streamed.answer[1].endswith("data: [DONE]\n\n")
    assert server.process.wait(10) == 0


def test_what_takes_too_long_is_told(start: Start) -> None:
    server = start("--drain", "0.3", "--max-tokens", "10000000", "--slots", "1")
    endless = LONG | {"max_tokens": 10_000_000}
    askings = [Asking(server, endless), Asking(server, endless | {"stream": True})]
    assert wait_until(lambda: server.gauge("samba_running") + server.gauge("samba_waiting") == 2, 10)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 10
    for asking in askings:
        asking.join()
    assert askings[0].answer[0] == 503
    assert '"code":"shutting_down"' in askings[1].answer[1]
    assert "[DONE]" not in askings[1].answer[1]


def test_twice_stops_at_once(start: Start) -> None:
    server = start("--max-tokens", "10000000")
    asking = Asking(server, LONG | {"max_tokens": 10_000_000, "stream": True})
    assert wait_until(lambda: server.gauge("samba_running") == 1, 10)
    server.process.send_signal(signal.SIGINT)
    assert wait_until(lambda: server.ask("GET", "/health")[0] == 503, 10)
    began = time.monotonic()
    server.stop(signal.SIGINT)
    assert time.monotonic() - began < 10
    asking.join()
