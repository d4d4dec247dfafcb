"""What a server refuses, and how fast: sizes, slowness, keys, crowds, nonsense."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from serving import KEY, OTHER_KEY, Server, Start, raw_post, read_all, wait_until

from samba_lm.engine.engine import QueueFullError, StoppedError
from samba_lm.errors import UserError
from samba_lm.generation.sampling import DamagedModelError
from samba_lm.serve.auth import Keys
from samba_lm.serve.errors import ApiError, api_error
from samba_lm.serve.models import ChatRequest, CompletionRequest, ContextRequest

ENDLESS = {"prompt": "a", "max_tokens": 4096, "stream": True, "ignore_eos": True}


def test_a_hundred_megabytes_are_refused_at_once(plain: Server) -> None:
    with plain.connect() as connection:
        began = time.monotonic()
        connection.sendall(raw_post("/v1/completions", b'{"prompt": "aaaa', 100_000_000))
        assert b"HTTP/1.1 413" in connection.recv(1000)
        assert time.monotonic() - began < 10
    status, told = plain.ask("POST", "/v1/completions", b" " * 100_000_000, {"Content-Type": "application/json"})
    assert status == 413
    assert "MiB (--max-body)" in told["error"]["message"]


def test_a_path_that_is_none_is_told_where_the_paths_are(plain: Server) -> None:
    status, told = plain.ask("POST", "/v1/embeddings", {"input": "a"})
    assert status == 404
    assert told["error"]["message"] == "There is no /v1/embeddings here: /openapi.json lists what there is."


def test_a_body_without_a_length_is_counted(plain: Server) -> None:
    with plain.connect() as connection:
        head = b"POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(6 << 4):
                connection.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
        assert b"HTTP/1.1 413" in connection.recv(1000)


def test_slow_clients_are_told_and_left(start: Start) -> None:
    server = start("--head-seconds", "0.5", "--body-seconds", "1")
    silent, head, body = server.connect(), server.connect(), server.connect()
    with silent, head, body:
        head.sendall(b"POST /v1/completions HTTP/1.1\r\nHos")
        body.sendall(raw_post("/v1/completions", b'{"prompt"', 100))
        for _ in range(8):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                head.sendall(b"t")
            body.sendall(b" ")
        began = time.monotonic()
        assert b"HTTP/1.1 408" in read_all(head)
        assert read_all(silent) == b""
        answer = read_all(body)
        assert b"HTTP/1.1 408" in answer
        assert b"did not come within 1 seconds" in answer
        assert time.monotonic() - began < 10
    assert server.ask("POST", "/v1/completions", {"prompt": "a"})[0] == 200


BAD_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "top_p": -NaN}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "model": "\\ud800"}',
    b'{"prompt": "a", "stop": [""]}',
    b'{"prompt": "a", "max_tokens": "5"}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "logit_bias": {"-1": 1}}',
    b'{"prompt": "a", "context_id": "../../etc/passwd"}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"messages": []}',
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:40]))
def test_nonsense_is_told(plain: Server, body: bytes) -> None:
    status, answer = plain.ask("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert status in (400, 404), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 500


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/contexts/..%2f..%2fetc%2fpasswd", 404),
        ("DELETE", "/v1/contexts/ctx-" + "a" * 22, 404),
        ("DELETE", "/v1/contexts/ctx-" + "a" * 5000, 404),
        ("GET", "/v1/models/other/name", 404),
        ("GET", "/health", 200),
        ("GET", "/openapi.json", 200),
    ],
)
def test_paths(plain: Server, method: str, path: str, status: int) -> None:
    got, answer = plain.ask(method, path)
    assert got == status
    if got >= 400:
        assert answer["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_foreign_page_could_send_is_refused(plain: Server, kind: str) -> None:
    """Browsers send these without asking the server first."""
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/contexts"):
        assert plain.ask("POST", path, b'{"prompt": "a"}', {"Content-Type": kind})[0] == 415


def test_no_page_of_another_origin_may_read_unless_asked(plain: Server, start: Start) -> None:
    origin = {"Origin": "https://example.org"}
    asking = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    open_server = start("--cors-origin", "https://example.org")
    assert "access-control-allow-origin" not in plain.ask_all("GET", "/v1/models", None, origin)[1]
    assert plain.ask_all("OPTIONS", "/v1/completions", None, asking)[0] == 405
    assert open_server.ask_all("GET", "/v1/models", None, origin)[1]["access-control-allow-origin"] == origin["Origin"]
    status, headers, _ = open_server.ask_all("OPTIONS", "/v1/completions", None, asking)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
    assert (
        "access-control-allow-origin"
        not in open_server.ask_all("GET", "/v1/models", None, {"Origin": "https://evil.example"})[1]
    )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:80", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[", 403),
        ("me@evil.example", 403),
        ("", 403),
    ],
)
def test_only_by_its_own_name(plain: Server, host: str, status: int) -> None:
    """Or a page whose name was made to lead here could read what it likes."""
    for path in ("/v1/models", "/", "/health"):
        assert plain.ask("GET", path, None, {"Host": host})[0] == status


def test_another_name_when_told(start: Start) -> None:
    server = start("--allowed-host", "model.example")
    assert server.ask("GET", "/v1/models", None, {"Host": "model.example:81"})[0] == 200
    assert server.ask("GET", "/v1/models")[0] == 403


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two keys, one slot, and one place in the queue."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# ours\n{KEY} name=ann concurrent=2\n{OTHER_KEY} requests_per_minute=3 # slow\n")
    server = Server(checkpoint, "--api-key-file", str(keys), "--slots", "1", "--queue", "1")
    yield server
    server.close()


def test_keys(guarded: Server) -> None:
    for path in ("/v1/models", "/metrics", "/v1/contexts"):
        for headers in ({}, {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer {KEY}x"}):
            status, found, answer = guarded.ask_all("GET", path, None, headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert found["www-authenticate"] == "Bearer"
        assert guarded.ask("GET", path, key=KEY)[0] == 200
    assert guarded.ask("GET", "/health")[0] == 200
    assert guarded.ask("POST", "/v1/completions", {"prompt": "a"})[0] == 401


def test_a_keys_contexts_are_its_own(guarded: Server) -> None:
    _, made = guarded.ask("POST", "/v1/contexts", {"text": "a secret"}, key=KEY)
    path = f"/v1/contexts/{made['id']}"
    assert guarded.ask("GET", path, key=KEY)[0] == 200
    assert guarded.ask("GET", path, key=OTHER_KEY)[0] == 404
    assert guarded.ask("GET", "/v1/contexts", key=OTHER_KEY)[1]["data"] == []
    assert guarded.ask("DELETE", path, key=KEY)[1]["deleted"]


def open_stream(server: Server, body: dict[str, Any], key: str) -> socket.socket:
    connection = server.connect()
    request = raw_post("/v1/completions", json.dumps(body).encode())
    connection.sendall(request.replace(b"Host: localhost", b"Host: localhost\r\nAuthorization: Bearer " + key.encode()))
    return connection


def test_a_full_queue_and_a_keys_limits(guarded: Server) -> None:
    connections = [open_stream(guarded, ENDLESS, KEY) for _ in range(2)]
    try:
        assert wait_until(lambda: guarded.gauge("samba_running", KEY) + guarded.gauge("samba_waiting", KEY) == 2, 10)
        status, headers, answer = guarded.ask_all("POST", "/v1/completions", {"prompt": "a"}, key=OTHER_KEY)
        assert (status, headers["retry-after"]) == (429, "1")
        assert "waiting, the limit is 1" in answer["error"]["message"]
    finally:
        for connection in connections:
            connection.close()
    assert wait_until(lambda: guarded.gauge("samba_running", KEY) == 0, 10)
    statuses = [guarded.ask_all("POST", "/v1/completions", {"prompt": "a"}, key=OTHER_KEY) for _ in range(5)]
    assert [status for status, _, _ in statuses].count(429) >= 2
    assert 1 <= int(statuses[-1][1]["retry-after"]) <= 21


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no API key"),
        ("short", "16 to 512"),
        (f"{KEY}\n{KEY}", "line 2: the same key"),
        (f"{KEY} concurent=3", "Did you mean 'concurrent'"),
        (f"{KEY} concurrent=0", "whole number"),
        (f"{KEY} concurrent=-1", "whole number"),
    ],
)
def test_wrong_key_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Keys.read(path)
    assert KEY not in str(caught.value)


def test_keys_are_checked_in_the_right_way(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY} name=ann requests_per_minute=2\n")
    keys = Keys.read(tmp_path / "keys")
    client = keys.check(f"bearer {KEY}")
    assert (client.name, client.requests_per_minute) == ("ann", 2)
    for wrong in (None, "", KEY, f"Basic {KEY}", f"Bearer {KEY}0", "Bearer \udcff"):
        with pytest.raises(ApiError):
            keys.check(wrong)
    client.enter()
    client.enter()
    with pytest.raises(ApiError, match="2 requests a minute"):
        client.enter()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", '{"prompt": [' + "-1," * 300_000 + "-1]}"),
        ("/v1/completions", '{"prompt": [' + "[]," * 300_000 + "[]]}"),
        ("/v1/completions", '{"prompt": "a", "stop": [' + "3," * 300_000 + "3]}"),
        ("/v1/contexts", '{"tokens": [' + "-1," * 300_000 + "-1]}"),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": [' + "{}," * 300_000 + "{}]}]}"),
    ],
)
def test_a_long_list_of_wrong_things_is_given_up_at_the_first(path: str, body: str) -> None:
    """A list of all of them took a gigabyte for each megabyte of the request."""
    kind = {"/v1/completions": CompletionRequest, "/v1/contexts": ContextRequest}.get(path, ChatRequest)
    with pytest.raises(ValidationError) as refused:
        kind.model_validate_json(body)
    assert refused.value.error_count() < 10


def test_more_logprobs_than_anybody_reads(plain: Server) -> None:
    prompt = {"prompt": "ab" * 10_000, "max_tokens": 0, "echo": True, "logprobs": 20, "n": 16}
    status, _, answer = plain.ask_all("POST", "/v1/completions", prompt)
    assert status == 400
    assert "log-probabilities, the limit is 500,000" in str(answer)


def test_a_key_may_hold_what_begins_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}#part-of-it name=ann # a comment\n")
    keys = Keys.read(file)
    assert keys.check(f"Bearer {KEY}#part-of-it").name == "ann"
    with pytest.raises(ApiError):
        keys.check(f"Bearer {KEY}")


def test_what_fails_is_counted_as_failed(plain: Server) -> None:
    """And a body that ends before its end is one quiet entry, not a failure."""
    with socket.create_connection(("127.0.0.1", plain.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    wait_until(lambda: 'status="499"' in plain.ask_all("GET", "/metrics")[2], 10)
    assert 'status="500"' not in plain.ask_all("GET", "/metrics")[2]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("n is 3, at most 2"), 400, "n is 3, at most 2"),
        (QueueFullError("3 wait"), 429, "3 wait"),
        (DamagedModelError("not finite"), 500, "not finite"),
        (StoppedError("secret"), 503, "try another one"),
        (KeyError("secret"), 500, "its log says what"),
    ],
)
def test_whose_fault_it_is(error: Exception, status: int, told: str) -> None:
    answer = api_error(error)
    assert answer.status == status
    assert told in answer.message
    assert "secret" not in answer.message
