"""Servers that the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from serving import Server, Start, make_model

import samba_lm
from samba_lm.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    samba_lm.save(make_model(), folder, ByteTokenizer())
    return folder


@pytest.fixture(scope="session")
def plain(checkpoint: Path) -> Iterator[Server]:
    """No keys, contexts in memory."""
    server = Server(checkpoint, "--max-body", "4", "--slots", "8")
    yield server
    server.close()


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Start]:
    """Starts servers with options of their own, which end with the test."""
    servers: list[Server] = []

    def begin(*options: str) -> Server:
        servers.append(Server(checkpoint, *options))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()
