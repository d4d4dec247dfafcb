"""`bench serve` counts what clients of a real server see, and nothing that did not come whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from serving import KEY, Server, make_model

import samba_lm
from samba_lm.bench.serving import Target, measure_crowd, measure_streams
from samba_lm.cli.main import main
from samba_lm.errors import UserError
from samba_lm.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One key, two slots, two places in the queue."""
    folder = tmp_path_factory.mktemp("bench")
    samba_lm.save(make_model(), folder / "tiny", ByteTokenizer())
    (folder / "keys").write_text(KEY)
    options = ("--slots", "2", "--queue", "2", "--api-key-file", str(folder / "keys"))
    server = Server(folder / "tiny", *options)
    yield server
    server.close()


def test_streams(server: Server) -> None:
    before = server.gauge("samba_generated_tokens_total", KEY)
    load = asyncio.run(measure_streams(Target(server.url, KEY, max_tokens=8), 3, 0.5))
    assert load.errors == []
    assert load.finished >= 3
    assert load.tokens == 8 * load.finished == server.gauge("samba_generated_tokens_total", KEY) - before
    assert (len(load.first), len(load.between)) == (load.finished, 7 * load.finished)
    assert 0.5 <= load.seconds < 20
    assert 0 < min(load.first) <= max(load.first) < load.seconds
    record = load.record()
    assert record["tokens_per_second"] == load.tokens / load.seconds
    assert set(record["between_tokens"]) == {"p50", "p99", "max"}  # type: ignore[call-overload]


@pytest.mark.parametrize(("key", "tokens", "status"), [("wrong-key-of-the-tests", 8, 401), (KEY, 5000, 400)])
def test_what_did_not_come_whole_is_an_error(server: Server, key: str, tokens: int, status: int) -> None:
    load = asyncio.run(measure_streams(Target(server.url, key, max_tokens=tokens), 1, 0.1))
    assert load.errors[0] == f"status {status}, 0 of {tokens} tokens"
    assert load.finished == load.tokens == len(load.first) == 0


def test_a_crowd_beyond_the_queue(server: Server) -> None:
    crowd = asyncio.run(measure_crowd(Target(server.url, KEY), 30, 4))
    assert crowd.statuses == {429: 30}
    assert len(crowd.seconds) == 30
    assert asyncio.run(measure_crowd(Target(server.url, "wrong-key-of-the-tests"), 2, 1)).statuses == {401: 2}


def test_the_command(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAMBA_LM_API_KEY", KEY)
    file = tmp_path / "figures.json"
    options = ["--streams", "2", "--seconds", "0.2", "--max-tokens", "4", "--crowd", "5", "--hold", "4"]
    assert main(["bench", "serve", server.url, *options, "--json", str(file)]) in (0, None)
    told = capsys.readouterr().out
    assert "0 errors" in told
    assert "5 clients beyond the queue: 5 x 429" in told
    record = json.loads(file.read_text())["serve"]
    assert record["streams"] == 2
    assert record["errors"] == 0
    assert record["crowd"]["statuses"] == {"429": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9"], "No server answers"),
        (["https://127.0.0.1:9"], "no server's address"),
        (["nonsense"], "no server's address"),
        (["http://127.0.0.1:99999"], "no server's address"),
        (["http://127.0.0.1:9", "--crowd", "3"], "--hold go together"),
        (["http://127.0.0.1:9", "--streams", "0"], "10000 --streams"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_target_without_a_host() -> None:
    with pytest.raises(UserError):
        Target("http:///x").address()
