"""A real server process on a real port, with a tiny random model."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import samba_lm
from samba_lm.config import Attention, Mamba, ModelConfig, SwiGLU
from samba_lm.model import SambaLM

KEY = "a-key-of-the-tests-0"
OTHER_KEY = "another-key-of-the-tests"


def make_model() -> SambaLM:
    layers = (Mamba(), SwiGLU(width=48), Attention(heads=2, window=24), SwiGLU(width=48))
    return samba_lm.create(ModelConfig(name="tiny", d_model=32, vocab_size=260, layers=layers, max_context=4096))


# A server's process begins as a copy of one that has imported everything, so that it starts at once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["samba_lm.serve.app", "samba_lm.serve.server", "samba_lm.cli.serve", "llguidance"])


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """In the process: ``samba-lm ARGUMENTS``, its errors in a file."""
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115 - until the process ends
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from samba_lm.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


class Process:
    """A process of :data:`_FORKS`, as subprocess has them."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self._process = _FORKS.Process(target=_run, args=(arguments, str(log), environment), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Exit code."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, "the server still runs"
        return code

    def close(self) -> None:
        if self.poll() is None:
            self._process.kill()
        self._process.join()
        self._process.close()


class Server:
    """``samba-lm serve`` as a process. Its errors are kept, to be shown and to be looked through."""

    def __init__(self, checkpoint: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        self._log.touch()
        self.process = Process(["serve", str(checkpoint), "--port", "0", *options], self._log, environment or {})
        self._port: int | None = None
        self._ended = ""

    @property
    def log(self) -> list[str]:
        return (self._ended or self._log.read_text(encoding="utf-8")).splitlines(keepends=True)

    @property
    def port(self) -> int:
        end = time.monotonic() + 60
        while self._port is None:
            found = re.search(r"at http://127\.0\.0\.1:(\d+)", "".join(self.log))
            if found:
                self._port = int(found[1])
            else:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < end, self.log
                time.sleep(0.02)
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str | None = None
    ) -> tuple[int, Any]:
        """Status and JSON (or text) of one request; a body that is no bytes is sent as JSON."""
        status, _, answer = self.ask_all(method, path, body, headers, key)
        return status, answer

    def ask_all(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str | None = None
    ) -> tuple[int, dict[str, str], Any]:
        headers = dict(headers or {})
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read().decode()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(data) if "json" in found.get("content-type", "") else data

    def gauge(self, name: str, key: str | None = None) -> float:
        """A number of /metrics."""
        _, text = self.ask("GET", "/metrics", key=key)
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Exit code."""
        self.process.send_signal(sig)
        return self.process.wait(60)

    def close(self) -> None:
        """End it, and check that it met no defect of ours."""
        self.process.close()
        self._ended = "".join(self.log) or "nothing was told"
        self._folder.cleanup()
        assert "Traceback" not in self._ended, self._ended


Start = Callable[..., Server]
"""Starts a server with these options."""


def wait_until(ready: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ready():
            return True
        time.sleep(0.02)
    return ready()


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def raw_post(path: str, body: bytes, length: int | None = None) -> bytes:
    """A request as it goes over the wire, whose length may be a lie."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return head.encode() + str(len(body) if length is None else length).encode() + b"\r\n\r\n" + body
