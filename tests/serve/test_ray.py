"""Two replicas behind Ray Serve, as `serve run` starts them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import below
from serving import wait_until

from samba_lm.errors import UserError

pytest.importorskip("ray", reason="needs the extra ray")

pytestmark = pytest.mark.slow

BOOK = "It was a dark and stormy night; the rain fell in torrents. " * 40
ENDLESS = {"prompt": "a", "max_tokens": 4_000_000, "stream": True, "ignore_eos": True}


class Cluster:
    """Two replicas on a port of their own."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        arguments = {
            "checkpoint": str(checkpoint),
            "contexts": str(folder / "contexts"),
            "replicas": 2,
            "cpus": 0.1,
            "max_tokens": 10_000_000,
        }
        application = {
            "name": "samba",
            "route_prefix": "/",
            "import_path": "samba_lm.serve.ray:app",
            "args": arguments,
        }
        config = {"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [application]}
        (folder / "serve.yaml").write_text(json.dumps(config))
        self._log = folder / "log"
        # What it keeps there must have short names: they are those of sockets.
        self._own = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": self._own}
        command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "serve.yaml")]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            return self.ask("GET", "/health")[0] == 200 and len(self.replicas()) == 2
        except (OSError, http.client.HTTPException):
            return False

    def log(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text(errors="replace"))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = self.connect()
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {} if data is None else {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            kind = response.getheader("content-type") or ""
            return response.status, json.loads(text) if "json" in kind else text
        finally:
            connection.close()

    def replicas(self) -> set[int]:
        """Processes of replicas among those that ours began."""
        found = set()
        for pid in below(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                    found.add(pid)
        return found

    def running(self) -> float:
        """Texts that are being made, by what both replicas say."""
        return max(self.ask("GET", "/health")[1]["running"] for _ in range(8))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            shutil.rmtree(self._own, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(checkpoint, tmp_path_factory.mktemp("ray"))
    try:
        assert wait_until(cluster.ready, 120), cluster.log()
        yield cluster
    finally:
        cluster.close()


def test_what_one_has_read_the_other_continues(cluster: Cluster) -> None:
    status, made = cluster.ask("POST", "/v1/contexts", {"text": BOOK, "title": "A book"})
    assert status == 200, made
    body = {"prompt": "Then", "context_id": made["id"], "max_tokens": 10, "temperature": 0}

    def both() -> bool:
        """Whether both had a part in it."""
        answers = [cluster.ask("POST", "/v1/completions", body) for _ in range(8)]
        assert {status for status, _ in answers} == {200}
        texts.update(answer["choices"][0]["text"] for _, answer in answers)
        cached.update(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for _, answer in answers)
        counters = [cluster.ask("GET", "/metrics")[1] for _ in range(16)]
        made = {float(re.findall(r"^samba_generated_tokens_total (\S+)", text, re.M)[0]) for text in counters}
        return len(made) == 2 and min(made) > 0

    texts, cached = set[str](), set[int]()
    assert wait_until(both, 60)
    assert len(texts) == 1
    assert cached == {len(BOOK)}
    assert cluster.ask("DELETE", f"/v1/contexts/{made['id']}")[0] == 200
    assert {cluster.ask("POST", "/v1/completions", body)[0] for _ in range(8)} == {404}


def test_streams_come_as_they_are_made_and_end_with_their_client(cluster: Cluster) -> None:
    connection = cluster.connect()
    connection.request("POST", "/v1/completions", json.dumps(ENDLESS), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.getheader("content-type", "").startswith("text/event-stream")
    for _ in range(50):
        assert response.readline().startswith(b"data: ")
        response.readline()
    assert wait_until(lambda: cluster.running() == 1, 10)
    connection.close()
    assert wait_until(lambda: cluster.running() == 0, 10)


def test_what_is_wrong_is_told_as_without_ray(cluster: Cluster) -> None:
    status, answer = cluster.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": -1})
    assert status == 400
    assert "max_tokens" in answer["error"]["message"]


def test_a_replica_that_dies_is_replaced(cluster: Cluster) -> None:
    _, made = cluster.ask("POST", "/v1/contexts", {"text": "abc"})
    before = cluster.replicas()
    os.kill(min(before), signal.SIGKILL)
    body = {"prompt": "Then", "context_id": made["id"], "max_tokens": 3}

    def all_answer() -> bool:
        return all(cluster.ask("POST", "/v1/completions", body)[0] == 200 for _ in range(16))

    assert wait_until(all_answer, 10), cluster.log()
    assert wait_until(lambda: len(cluster.replicas() - {min(before)}) == 2, 60), cluster.log()
    assert wait_until(all_answer, 30), cluster.log()


@pytest.mark.filterwarnings("ignore")  # of Ray's own modules
def test_replicas_without_a_common_place_are_refused() -> None:
    from samba_lm.serve.ray import Options, app

    with pytest.raises(UserError, match="contexts of their own"):
        app(Options(checkpoint="samba-micro", replicas=2))
