"""What a careless or malicious client sends below and beside the fields of a request."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import KEY, Server, Start, make_model, raw_post, read_all, wait_until

import samba_lm
from samba_lm.errors import UserError
from samba_lm.serve.auth import Keys
from samba_lm.tokenizer import train_bpe

HUGE = "9" * 4000
"""More digits than any of our numbers, and fewer than Python's own limit for texts of numbers."""


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n",  # TLS
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA" + b"a" * 1_000_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\na",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n\r\n",
    ],
    ids=lambda each: repr(each[:30]),
)
def test_what_is_no_http_gets_our_errors_too(plain: Server, request_bytes: bytes) -> None:
    with plain.connect() as connection:
        connection.sendall(request_bytes)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4")
    assert b"content-type: application/json" in head.lower()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def send_for(connection: socket.socket, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection.sendall(b"a" * 1000)
        time.sleep(0.05)


POST_AND_CLOSE = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("begin", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA" + b"a" * 100_000, 400),
        (POST_AND_CLOSE + b"Content-Type: application/json\r\nContent-Length: 100000000\r\n\r\n{", 413),
        (POST_AND_CLOSE + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\nx\r\n", 400),
    ],
    ids=["head", "refused body", "malformed body"],
)
def test_a_client_that_still_sends_can_read_its_answer(plain: Server, begin: bytes, status: int) -> None:
    with plain.connect() as connection:
        connection.sendall(begin)
        connection.recv(1, socket.MSG_PEEK)  # it is answered, and maybe closed
        for _ in range(20):
            connection.sendall(b"a" * 50_000)
            time.sleep(0.005)  # time for a reset to come back
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status)
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        with pytest.raises(ConnectionError):  # it has answered and does not listen for ever
            send_for(connection, 30)
    assert plain.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(
            ("/v1/completions", f'{{"prompt": "a", "{name}": {HUGE}}}')
            for name in ("max_tokens", "seed", "temperature", "top_k", "n", "logprobs", "presence_penalty", "best_of")
        ),
        ("/v1/completions", f'{{"prompt": "a", "seed": {2**63}}}'),
        ("/v1/completions", f'{{"prompt": [{HUGE}]}}'),
        ("/v1/completions", f'{{"prompt": [{2**63}]}}'),
        ("/v1/completions", f'{{"prompt": "a", "logit_bias": {{"{HUGE}": 1}}}}'),
        ("/v1/completions", '{"prompt": "a", "logit_bias": {"999999999": 1}}'),
        ("/v1/completions", f'{{"prompt": "a", "logit_bias": {{"65": {HUGE}}}}}'),
        ("/v1/contexts", f'{{"tokens": [{HUGE}]}}'),
        *(
            (
                "/v1/chat/completions",
                '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "response_format": {"type": '
                f'"json_schema", "json_schema": {{"schema": {schema}}}}}}}',
            )
            for schema in (
                f'{{"type": "integer", "maximum": {HUGE}}}',
                f'{{"type": "integer", "minimum": {2**64}}}',
                f'{{"type": "integer", "multipleOf": {HUGE}}}',
                f'{{"type": "string", "minLength": {HUGE}}}',
                f'{{"type": "string", "maxLength": {2**64}}}',
                f'{{"type": "array", "minItems": {2**65}}}',
                f'{{"enum": [{HUGE}]}}',
                f'{{"const": -{HUGE}}}',
                '{"type": "number", "maximum": 1e400}',
                '{"type": "string", "maxLength": 9223372036854775807}',
                '{"type": "integer", "minimum": 9223372036854775807, "maximum": -9223372036854775808}',
            )
        ),
    ],
    ids=lambda each: each[-60:],
)
def test_numbers_of_any_size_are_never_our_failure(plain: Server, path: str, body: str) -> None:
    status, answer = plain.ask("POST", path, body.encode(), {"Content-Type": "application/json"})
    assert status < 500, answer
    if "schema" not in body:  # some schemas can be followed
        assert status == 400, answer
    if status != 200:
        assert len(answer["error"]["message"]) < 500


def test_longer_numbers_than_python_reads(plain: Server) -> None:
    for body in ('{"prompt": "a", "metadata": {"a": %s}}', '{"prompt": "a", "seed": %s}', "%s"):
        data = (body % ("9" * 100_000)).encode()
        assert plain.ask("POST", "/v1/completions", data, {"Content-Type": "application/json"})[0] in (200, 400)
    path = f"/v1/contexts?title={'9' * 5000}"
    assert plain.ask("POST", path, b"a", {"Content-Type": "application/octet-stream"})[0] == 400


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
def test_compressed_bodies(plain: Server, encoding: str) -> None:
    for path, kind in (("/v1/completions", "application/json"), ("/v1/contexts", "application/octet-stream")):
        headers = {"Content-Type": kind, "Content-Encoding": encoding}
        status, answer = plain.ask("POST", path, b"\x1f\x8b\x08\x00", headers)
        assert status == 415
        assert "compressed" in answer["error"]["message"]


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with more rows than its tokenizer has tokens, as many have, so that their number is a round one."""
    tokenizer = train_bpe(["the sea is salt, the sea is wide " * 20], 270)
    assert tokenizer.vocab_size < 280
    model = samba_lm.create(make_model().config.with_overrides(vocab_size=320))
    folder = tmp_path_factory.mktemp("padded") / "model"
    samba_lm.save(model, folder, tokenizer)
    server = Server(folder)
    yield server
    server.close()


def test_ids_that_are_no_tokens(padded: Server) -> None:
    size = 300
    for path, body in (("/v1/completions", {"prompt": [65, size]}), ("/v1/contexts", {"tokens": [65, size]})):
        status, answer = padded.ask("POST", path, body)
        assert status == 400
        assert f"Token id {size} at position 1 is no token" in answer["error"]["message"]
    assert padded.ask("POST", "/v1/completions", {"prompt": [65, 66], "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("number", ["0" * 9 + "1" + "9" * 5000, "1" + "0" * 5000, "9" * 10, "٣", "1e3", "0"])
def test_numbers_in_key_files(tmp_path: Path, number: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY} concurrent={number}\n", encoding="utf-8")
    with pytest.raises(UserError, match="whole number"):
        Keys.read(file)


def test_numbers_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from samba_lm.cli.main import main

    for option in ("--port", "--slots", "--max-body", "--drain", "--max-tokens"):
        assert main(["serve", "nowhere", option, "9" * 5000]) == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        assert option in shown


def test_a_half_sent_body_at_the_end(start: Start) -> None:
    """Told to stop, the server does not wait for it longer than for others, and is not upset."""
    server = start("--drain", "0.3")
    half, chunked = server.connect(), server.connect()
    with half, chunked:
        half.sendall(raw_post("/v1/completions", b'{"prompt"', 1000))
        head = b"POST /v1/contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        chunked.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        time.sleep(0.3)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 10
        for each in (half, chunked):
            assert b"HTTP/1.1 503" in read_all(each)
    assert not [line for line in server.log if "rror" in line or "Exception" in line], server.log


def test_a_client_that_leaves_in_the_middle(start: Start) -> None:
    server = start()
    for count in range(20):
        with server.connect() as connection:
            connection.sendall(raw_post("/v1/completions", b'{"prompt"', 1000)[: 10 + 10 * count])
            if count % 2:  # rudely
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, np.array([1, 0], np.int32).tobytes())
    assert wait_until(lambda: server.ask("GET", "/health")[1]["waiting"] == 0, 10)
    assert not [line for line in server.log if "rror" in line or "Exception" in line], server.log
