"""A real server process on a real port, with a tiny random model."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
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


class Server:
    """``samba-lm serve`` as a process. Its errors are kept, to be shown and to be looked through."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [sys.executable, "-m", "samba_lm", "serve", str(checkpoint), "--port", "0", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        self._started = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if re.search(r"serving .* at http", line):
                self._started.set()
        self._started.set()

    @property
    def port(self) -> int:
        assert self._started.wait(60), self.log
        found = [match[1] for line in self.log if (match := re.search(r"at http://127\.0\.0\.1:(\d+)", line))]
        assert found, "".join(self.log)
        return int(found[0])

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
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


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
